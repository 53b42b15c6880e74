"""Every error bsrgen raises on purpose.  Those about arguments are also ValueError or TypeError."""


class BsrgenError(Exception):
    """Base of all errors of this package."""


class PatternError(BsrgenError, ValueError):
    """The weight is not a valid block-sparse matrix."""


class PatternMismatchError(PatternError):
    """New values came with another pattern than the kernel was built for."""


class CapacityError(PatternError):
    """A weight has more blocks than the kernel that takes it with the call was planned for."""


class ArgumentError(BsrgenError, ValueError):
    """An argument has a value that cannot be used."""


class ArgumentTypeError(BsrgenError, TypeError):
    """An argument has a type (or dtype) that cannot be used."""


class UnsupportedError(BsrgenError, ValueError):
    """What was asked for is well-formed, but no backend or target here can do it."""


class BuildError(BsrgenError, RuntimeError):
    """The compiler failed; the message carries the command, its first error and the kept folder."""


class CompilerNotFoundError(BuildError):
    """No usable C compiler for the target."""


class StoreError(BsrgenError, OSError):
    """The store cannot be read or written (disk full, read-only, unsafe permissions)."""


class DeviceError(BsrgenError, RuntimeError):
    """The GPU or its driver cannot do what was asked: no driver, no GPU, no code for it."""


class CaptureError(DeviceError):
    """A call that a CUDA graph records needs memory that can only be made outside of one."""


class OutOfMemoryError(BsrgenError, MemoryError):
    """A library found no memory for its work; nothing has changed."""


class ArtifactError(BsrgenError, RuntimeError):
    """An artifact cannot be used."""


class ArtifactCorruptError(ArtifactError):
    """A file of the artifact is missing, truncated or altered."""


class IncompatibleCPUError(ArtifactError):
    """This CPU lacks features that every kernel of the artifact needs."""
