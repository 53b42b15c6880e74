"""The C backend: plans, their text, and what may be tried for a problem."""

from bsrgen.backends.c.candidates import candidates
from bsrgen.backends.c.pattern_plan import plan_pattern
from bsrgen.backends.c.pattern_text import emit_pattern
from bsrgen.backends.c.plan import CPlan
from bsrgen.backends.c.text import emit

__all__ = ["CPlan", "candidates", "emit", "emit_pattern", "plan_pattern"]
