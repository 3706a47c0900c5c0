"""What every config dataclass of this package asks of pydantic."""

from typing import Any

STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}
"""Unknown keys, and numbers that are infinite or none, are refused when a mapping is validated."""
