"""Names that users give and that become folders: of categories, and of the models of a benchmark."""


def check_folder_name(name: str, subject: str) -> None:
    r"""Check that a name is that of one folder below another, on every file system.

    Otherwise it might lead out of the folder that it is to lie in: a benchmark clears the folders of its runs.

    Args:
        name: The name.
        subject: What has it, for the message.

    Raises:
        ValueError: If it is empty, ``.`` or ``..``, or contains ``/``, ``\`` or control characters such as newlines.
    """
    if name in {"", ".", ".."} or any(character in "/\\" or ord(character) < 32 for character in name):
        msg = (
            f"{name!r} cannot be the name of a {subject}, because folders are named after it. Rename it: not empty, "
            "not '.' or '..', without '/', '\\', line breaks and other control characters."
        )
        raise ValueError(msg)
