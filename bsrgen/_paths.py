"""Where the templates and the runtime text lie: inside the package in a wheel, beside it in a checkout."""

from pathlib import Path

_PACKAGE = Path(__file__).parent
_ROOT = _PACKAGE if (_PACKAGE / "templates").is_dir() else _PACKAGE.parent
TEMPLATES, RUNTIME = _ROOT / "templates", _ROOT / "runtime"
