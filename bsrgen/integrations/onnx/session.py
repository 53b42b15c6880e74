"""A session of ONNX Runtime on a folder that `convert` made."""

import os
from pathlib import Path
from typing import Any

from bsrgen.errors import ArtifactError, UnsupportedError
from bsrgen.integrations.onnx.convert import GRAPH
from bsrgen.integrations.onnx.library import LIBRARY


def session(folder: str | os.PathLike[str], options: Any = None, **more: Any) -> Any:
    """An onnxruntime.InferenceSession on the CPU.  options: SessionOptions, to which the operators are added.

    Without bsrgen the same is `options.register_custom_ops_library("FOLDER/libbsrgen_onnx.so")` and a session on
    FOLDER/model.onnx, in any language.  Threads are the session's.
    Errors: UnsupportedError where onnxruntime is not installed, ArtifactError where the folder is no such model.
    """
    try:
        import onnxruntime
    except ImportError as e:
        raise UnsupportedError("running ONNX models needs onnxruntime: pip install 'bsrgen[onnx]'") from e
    folder = Path(folder).absolute()
    for name in (GRAPH, LIBRARY):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder}: no {name}; make the folder with bsrgen.integrations.onnx.convert")
    options = options or onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(folder / LIBRARY))
    more.setdefault("providers", ["CPUExecutionProvider"])
    return onnxruntime.InferenceSession(str(folder / GRAPH), options, **more)
