"""What every config dataclass of this package asks of pydantic."""

from typing import Any

STRICT: dict[str, Any] = {"extra": "forbid"}
"""Unknown keys are refused when a mapping is validated."""
