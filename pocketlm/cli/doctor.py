"""`pocketlm doctor`."""

from typer import Exit


def main() -> None:
    """Say what is installed, what would run, and what would stop it."""
    from rich.console import Console
    from rich.table import Table

    from pocketlm.workflow.doctor import topics
    from pocketlm.workflow.preconditions import complete_environment

    complete_environment()
    console, obstacles = Console(highlight=False, markup=False, emoji=False), 0
    for topic, facts in topics():
        table = Table("", "", show_header=False, box=None, padding=(0, 2, 0, 0))
        for fact in facts:
            table.add_row(fact.name, fact.value, style="red" if fact.repair else "")
            if fact.repair:
                table.add_row("repair", fact.repair)
        console.print(topic, style="bold")
        console.print(table)
        obstacles += sum(bool(fact.repair) for fact in facts)
    if obstacles:
        print(f"{obstacles} obstacle{'s' * (obstacles > 1)} for `snakemake --cores all report`")
        raise Exit(1)
    print("nothing stops `snakemake --cores all report`")
