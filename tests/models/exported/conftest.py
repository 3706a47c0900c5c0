"""Where transformers keeps its copies of a folder's source files while these tests run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _module_copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    dynamic = pytest.importorskip("transformers.dynamic_module_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
