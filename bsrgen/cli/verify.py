"""bsrgen verify: is this artifact what it says it is?"""

from pathlib import Path

import click

from bsrgen.cli.common import FAILED, console, plain, show_json, verb


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--expect-sha256", metavar="HEX", help="What manifest.sha256 must say: whose artifact this is.")
@verb
def verify(*, folder: Path, expect_sha256: str | None, as_json: bool) -> int:
    """Check the artifact in FOLDER: files, CPU, pattern, values, and results against float64.

    The weight is read back out of the library and must be the one of the manifest; the kernel must then agree with
    the float64 reference of that weight on random data.
    """
    from bsrgen.verify import verify as check

    kernel, findings = check(folder, expect_sha256=expect_sha256)
    sha256 = kernel.artifact.sha256
    good = all(finding.ok for finding in findings)
    if as_json:
        checks = [{"what": f.what, "ok": f.ok, "detail": f.detail} for f in findings]
        show_json({"folder": str(folder), "name": kernel.name, "ok": good, "sha256": sha256, "checks": checks})
        return 0 if good else FAILED
    out = console()
    out.print(f"[bold]{kernel.name}[/]")
    for f in findings:
        out.print(
            f"  {'[green]ok    [/]' if f.ok else '[red]FAILED[/]'}  {f.what:8}  {plain(f.detail)}", soft_wrap=True
        )
    out.print(f"  [dim]sha256    {sha256}[/]")
    out.print("verified" if good else "[red]not what it says: do not use it[/]")
    return 0 if good else FAILED
