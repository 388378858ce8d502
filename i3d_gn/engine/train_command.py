"""The command that trains, the same for all tasks. Torch is imported when it trains."""

import argparse
import pkgutil

from i3d_gn.engine.command import start_logging


def train_command(
    parser: argparse.ArgumentParser, argv: list[str], *, load_config: str, train: str
) -> int:
    """Run `parser`, one of `config_parser`, and train on as many ranks as there are.

    Args:
        parser: Of the command.
        argv: Its arguments.
        load_config: `module:function` from a path and overrides to the config. It is imported only
            when the command runs, and what imports torch only when it trains.
        train: `module:function` of the config and this process.
    """
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config and exit"
    )
    args = parser.parse_intermixed_args(argv)
    config = pkgutil.resolve_name(load_config)(args.config, tuple(args.overrides))
    if args.print_config:
        from i3d_gn.engine.typed_config import to_yaml

        print(to_yaml(config), end="")
        return 0
    from i3d_gn.engine.distributed import init_process_group

    run = pkgutil.resolve_name(train)
    start_logging()
    with init_process_group(timeout_minutes=config.train.rank_timeout_minutes) as process:
        run(config, process)
    return 0
