"""Formulas of epilogues, C over one number, as operations of the arith dialect: one text for all backends."""

import ast
import re
from collections.abc import Mapping

from bsrgen.errors import UnsupportedError

# Functions of one number that a GPU has no instruction for, as NVIDIA's library of them names them, for float.
LIBRARY = {"v_tanh": "__nv_tanh", "v_normcdf": "__nv_normcdf", "exp": "__nv_exp"}
_OPERATIONS = {ast.Add: "addf", ast.Sub: "subf", ast.Mult: "mulf", ast.Div: "divf"}


class Formula:
    """Lines of one block, in which each value has a number, over one type."""

    def __init__(self, real: str) -> None:
        self.real = real
        self.lines: list[str] = []
        self.functions: set[str] = set()

    def value(self, formula: str, names: Mapping[str, str]) -> str:
        """Print `formula`; the name of its value.  `names`: those of the formula -> those of the block."""
        tree = ast.parse(re.sub(r"^(.*?)\?(.*):(.*)$", r"(\2) if (\1) else (\3)", formula).strip(), mode="eval")
        return self._of(tree.body, names, "fastmath<contract>")

    def line(self, operation: str) -> str:
        """One operation; the name of its result."""
        name = f"%v{len(self.lines)}"
        self.lines.append(f"{name} = {operation}")
        return name

    def _of(self, node: ast.expr, names: Mapping[str, str], flags: str) -> str:
        match node:
            case ast.Name(id=name):
                return names[name]
            case ast.Constant(value=int() | float() as number):
                return self.line(f"arith.constant {float(number)!r} : {self.real}")
            case ast.BinOp(left=left, op=op, right=right):
                a, b = (self._of(side, names, "fastmath<contract>") for side in (left, right))
                return self.line(f"arith.{_OPERATIONS[type(op)]} {a}, {b} {flags} : {self.real}")
            case ast.IfExp(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]), body=yes, orelse=no):
                a, b, c, d = (self._of(part, names, flags) for part in (left, right, yes, no))
                equal = self.line(f"arith.cmpf oeq, {a}, {b} : {self.real}")
                return self.line(f"arith.select {equal}, {c}, {d} : {self.real}")
            case ast.Call(func=ast.Name(id=name), args=arguments):
                inside = "fastmath<none>" if name == "rounded" else flags  # a product of its own: not contracted
                return self._call(name, [self._of(argument, names, inside) for argument in arguments])
        raise UnsupportedError(
            f"a formula has {ast.dump(node)}, which backend='mlir' cannot print for GPUs; take backend='cuda'"
        )

    def _call(self, name: str, arguments: list[str]) -> str:
        real, v = self.real, arguments[0]
        if name in ("R", "splat", "rounded"):
            return v
        if name in ("v_max", "v_min"):  # a NaN in the first argument comes through
            compare = self.line(f"arith.cmpf {'ogt' if name == 'v_max' else 'olt'}, {arguments[1]}, {v} : {real}")
            return self.line(f"arith.select {compare}, {arguments[1]}, {v} : {real}")
        if name == "v_sigmoid":
            one = self.line(f"arith.constant 1.0 : {real}")
            power = self._call("exp", [self.line(f"arith.negf {v} : {real}")])
            return self.line(f"arith.divf {one}, {self.line(f'arith.addf {one}, {power} : {real}')} : {real}")
        function = LIBRARY[name] + "f" * (real == "f32")
        self.functions.add(function)
        return self.line(f"func.call @{function}({v}) : ({real}) -> {real}")
