"""`sublet finetune`: the preset of `sublet.finetune` from the command line."""

from collections.abc import Sequence
from typing import Any

from sublet.cli.failing import CommandError
from sublet.cli.options import Parser, client, with_broker, with_json
from sublet.cli.run import agreed, result


def finetune(argv: Sequence[str]) -> int:
    """Submit a fine-tuning job."""
    parser = Parser("finetune", "LoRA on a text classifier; brings back adapter, metrics, curve.")
    parser.add_argument(
        "base", metavar="BASE", help="a model's folder here or in the image, or minilm"
    )
    parser.add_argument("data", metavar="DATA", help=".csv or .jsonl")
    parser.add_argument("--max-price", required=True, metavar="CREDITS", help="per device-hour")
    parser.add_argument("--budget", required=True, metavar="CREDITS", help="in all")
    parser.add_argument("--text", default="text", metavar="COLUMN", help="default: text")
    parser.add_argument("--label", default="label", metavar="COLUMN", help="default: label")
    parser.add_argument("--gpus", default="1x8GB", metavar="N", help="default: 1x8GB")
    parser.add_argument("--epochs", type=float, default=1.0, metavar="N", help="default: 1")
    parser.add_argument("--image", help="default: $SUBLET_FINETUNE_IMAGE, or ours")
    parser.add_argument("--name", default="finetune", help="default: finetune")
    parser.add_argument("--wait", action="store_true", help="queue it even if nobody could take it")
    parser.add_argument("-d", "--detach", action="store_true", help="print the id and leave")
    parser.add_argument("-y", "--yes", action="store_true", help="submit without asking")
    options = with_json(with_broker(parser)).parse_args(argv)
    from contextlib import redirect_stdout
    from sys import stderr

    from sublet.finetuning import DataError
    from sublet.finetuning import finetune as preset
    from sublet.spec import JobSpec

    with client(options) as asker:

        def run(**wishes: Any) -> Any:
            return agreed(asker, JobSpec(**wishes), wait=options.wait, yes=options.yes)

        try:
            with redirect_stdout(stderr):
                job = preset(
                    options.base,
                    options.data,
                    text=options.text,
                    label=options.label,
                    max_price=options.max_price,
                    budget=options.budget,
                    epochs=options.epochs,
                    gpus=options.gpus,
                    image=options.image,
                    name=options.name,
                    run=run,
                )
        except DataError as error:
            raise CommandError(str(error), "nothing was submitted; correct the data") from error
        except ValueError as error:
            raise CommandError(str(error)) from error
    with client(options) as asker:
        return result(asker.job(job.id), detach=options.detach, as_json=options.json)
