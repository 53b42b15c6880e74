"""bsrgen cache: the store of built artifacts."""

import time
from typing import TYPE_CHECKING

import click

from bsrgen.cli.common import byte_count, console, plain, show_json, size, verb

if TYPE_CHECKING:
    from bsrgen.store import Entry, Store


@click.group()
def cache() -> None:
    """The store of built artifacts: ls, gc, clear."""


@cache.command("ls")
@verb
def ls(*, as_json: bool) -> None:
    """List the artifacts, the most recently used first."""
    from bsrgen.store import Store

    store = Store.default()
    entries = store.entries()[::-1]
    if as_json:
        show_json(_document(store, entries))
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, justify in (("key", "left"), ("name", "left"), ("size", "right"), ("last used", "right")):
        table.add_column(name, justify=justify, no_wrap=name != "name", overflow="fold")  # type: ignore[arg-type]
    for entry in entries:
        table.add_row(entry.key[:12], entry.name or "(call path)", size(entry.bytes), _ago(entry.last_use_s))
    out = console()
    if entries:
        out.print(table)
    total, most = size(sum(entry.bytes for entry in entries)), size(store.max_bytes)
    out.print(f"{len(entries)} artifacts, {total} of at most {most}, in {plain(str(store.root))}", soft_wrap=True)


@cache.command("gc")
@click.option("--max-bytes", callback=byte_count, metavar="BYTES", help="E.g. 500M.  [default: the store's limit]")
@verb
def gc(*, max_bytes: int | None, as_json: bool) -> None:
    """Evict what was not used for longest until the rest fits, and sweep what killed builds left."""
    from bsrgen.store import Store

    store = Store.default()
    _removed(store, store.gc(max_bytes), as_json)


@cache.command("clear")
@verb
def clear(*, as_json: bool) -> None:
    """Evict everything.  Running builds and loaded kernels are not disturbed."""
    from bsrgen.store import Store

    store = Store.default()
    _removed(store, store.clear(), as_json)


def _removed(store: "Store", entries: list["Entry"], as_json: bool) -> None:
    if as_json:
        show_json(_document(store, entries))
    else:
        freed = size(sum(entry.bytes for entry in entries))
        console().print(f"removed {len(entries)} artifacts, {freed}, from {plain(str(store.root))}", soft_wrap=True)


def _document(store: "Store", entries: list["Entry"]) -> dict[str, object]:
    rows = [{"key": e.key, "name": e.name, "bytes": e.bytes, "last_use_s": e.last_use_s} for e in entries]
    return {"root": str(store.root), "max_bytes": store.max_bytes, "entries": rows}


def _ago(when_s: float) -> str:
    seconds = max(0.0, time.time() - when_s)
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"
