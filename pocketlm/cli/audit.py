"""`pocketlm audit`."""

from typer import Exit


def main() -> None:
    """Check the results of every seed; status 1 if a check has failed."""
    from rich.console import Console

    from pocketlm.audit.checks import failed
    from pocketlm.audit.outcome import outcome, require_audited, table
    from pocketlm.params.load import load_params
    from pocketlm.workflow.preconditions import check_checkout, complete_environment

    check_checkout()
    complete_environment()
    params = load_params()
    require_audited(params)
    checks = outcome()
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table(checks, params.seeds))
    for check in checks:
        for problem in check.problems:
            console.print(f"{check.title}: {problem}", style="red")
    if names := failed(checks, params.seeds):
        print(f"FAILED: {', '.join(names)}; artifacts/audit/audit.md says more")
        raise Exit(1)
    print(f"all {len(checks)} checks passed; artifacts/audit/audit.md says what was looked at")
