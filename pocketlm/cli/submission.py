"""`pocketlm submission`."""


def main() -> None:
    """Write the folder of a submission from report and audit."""
    from pocketlm.params.load import load_params
    from pocketlm.submission.folder import write_folder

    print(f"submission: {write_folder(load_params())}")
