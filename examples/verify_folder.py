"""Check a download before anything uses it; exit code 0 for a whole folder, 1 for a damaged one.

    python examples/verify_folder.py FOLDER [--quick]

--quick reads sizes, archive directories and tensor shapes only: seconds, even for a 405B.
"""

import sys

from llama_ref.checkpoint.integrity import verify


def main(folder: str, *flags: str) -> int:
    report = verify(folder, quick="--quick" in flags)
    for file in report.files:
        print(f"{file.state:12}  {file.name}")
    for file in report.bad:
        print(f"{file.name}: {file.detail or file.state}. {file.advice}", file=sys.stderr)
    print(report.summary())
    return report.exit_code  # 2: no checkpoint there; 3: no checksums to compare with


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
