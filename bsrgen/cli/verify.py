"""bsrgen verify: is this artifact, or every one of a model, what it says it is?"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bsrgen.cli.common import FAILED, console, plain, show_json, verb
from bsrgen.cli.model import record_of

if TYPE_CHECKING:
    from bsrgen.kernel import Kernel
    from bsrgen.verify import Finding


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--expect-sha256", metavar="HEX", help="Of manifest.json, or of model.json: whose it must be.")
@verb
def verify(*, folder: Path, expect_sha256: str | None, as_json: bool) -> int:
    """Check the artifact in FOLDER, or all of a model: files, CPU, pattern, values, and results against float64.

    The weight is read back out of the library and must be the one of the manifest; the kernel must then agree with
    the float64 reference of that weight on random data.
    """
    from bsrgen.model import KERNELS
    from bsrgen.verify import verify as check

    record = record_of(folder, expect_sha256)
    own = {folder: expect_sha256}
    if record is not None:
        own = {folder / KERNELS / layer.kernel: layer.sha256 for layer in record.layers.values()}
    documents = [_checked(place, *check(place, expect_sha256=sha256)) for place, sha256 in own.items()]
    good = all(document["ok"] for document in documents)
    if as_json:
        show_json(documents[0] if record is None else {"folder": str(folder), "ok": good, "kernels": documents})
        return 0 if good else FAILED
    for document in documents:
        _show(document)
    console().print("verified" if good else "[red]not what it says: do not use it[/]")
    return 0 if good else FAILED


def _checked(folder: Path, kernel: "Kernel", findings: "list[Finding]") -> dict[str, Any]:
    checks = [{"what": f.what, "ok": f.ok, "detail": f.detail} for f in findings]
    good, sha256 = all(f.ok for f in findings), kernel.artifact.sha256
    return {"folder": str(folder), "name": kernel.name, "ok": good, "sha256": sha256, "checks": checks}


def _show(document: dict[str, Any]) -> None:
    out = console()
    out.print(f"[bold]{document['name']}[/]")
    for f in document["checks"]:
        mark = "[green]ok    [/]" if f["ok"] else "[red]FAILED[/]"
        out.print(f"  {mark}  {f['what']:8}  {plain(f['detail'])}", soft_wrap=True)
    out.print(f"  [dim]sha256    {document['sha256']}[/]")
