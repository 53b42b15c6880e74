"""Where things lie: the store; the templates and the runtime text, inside the package in a wheel, else beside it."""

import os
from pathlib import Path

from bsrgen.errors import StoreError

_PACKAGE = Path(__file__).parent
_ROOT = _PACKAGE if (_PACKAGE / "templates").is_dir() else _PACKAGE.parent
TEMPLATES, RUNTIME = _ROOT / "templates", _ROOT / "runtime"


def store_root() -> Path:
    """The store's folder, which need not exist: $BSRGEN_CACHE_DIR, else the cache folder of the platform."""
    import platformdirs

    try:
        named = os.environ.get("BSRGEN_CACHE_DIR")
        root = Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("bsrgen", appauthor=False))
        if not named and not root.is_absolute():
            raise RuntimeError
    except RuntimeError as error:
        raise StoreError("this user has no home folder for the store; set HOME or BSRGEN_CACHE_DIR") from error
    return root.absolute()
