"""The one exception shown to users as a sentence instead of a traceback."""


class InputError(Exception):
    """Something the user can repair: a parameter, a file, a machine that lacks what is asked for.

    `problem` names the file or key and what is wrong with it; `repair` says what to do.
    Steps print both without a traceback and exit with status 2.
    """

    def __init__(self, problem: str, repair: str) -> None:
        super().__init__(f"{problem}\n  repair: {repair}")
        self.problem = problem
        self.repair = repair

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, str]]:
        return (InputError, (self.problem, self.repair))
