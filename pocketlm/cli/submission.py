"""`pocketlm submission`."""


def main() -> None:
    """Write the folder of a submission from the report and the audit that are in force."""
    from pocketlm.params.load import load_params
    from pocketlm.submission.folder import write_folder

    print(f"submission: {write_folder(load_params())}")
