"""How long a command takes before it does anything: a fresh process each, beside bare imports."""

import subprocess
import sys

from benchmarks.harness import compare, save

COMMANDS = {
    "saccade --help": ["-m", "saccade.apps.cli", "--help"],
    "saccade fit --help": ["-m", "saccade.apps.cli", "fit", "--help"],
    "saccade list models": ["-m", "saccade.apps.cli", "list", "models"],
    "saccade config ls": ["-m", "saccade.apps.cli", "config", "ls"],
    "import saccade": ["-c", "import saccade"],
    "import saccade.attention": ["-c", "import saccade.attention"],
    "python alone": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import timm": ["-c", "import timm"],
    "import lightning": ["-c", "import lightning"],
}


def main() -> None:
    """Run and save."""

    def call(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    functions = {name: lambda arguments=arguments: call(arguments) for name, arguments in COMMANDS.items()}
    save("startup", [compare("start of a fresh process", functions, unit="starts")])


if __name__ == "__main__":
    main()
