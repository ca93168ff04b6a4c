"""`sublet finetune`: the preset of `sublet.finetune` from the command line."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from sublet.cli.errors import CommandError
from sublet.cli.job_options import add_job_options, given_options
from sublet.cli.parser import Parser, open_client, with_broker, with_json
from sublet.cli.run import agreed, result
from sublet.finetuning import PRESET, DataError
from sublet.finetuning import finetune as submit_finetuning

if TYPE_CHECKING:
    from sublet.client import Job


def finetune(argv: Sequence[str]) -> int:
    """Submit a fine-tuning job."""
    parser = Parser(
        "finetune",
        "LoRA on a text classifier; brings back adapter, metrics, curve.",
        usage="sublet finetune [OPTIONS] BASE DATA",
    )
    parser.add_argument(
        "base", metavar="BASE", help="a model's folder here or in the image, or minilm"
    )
    parser.add_argument("data", metavar="DATA", help=".csv or .jsonl")
    parser.add_argument("--text", default="text", metavar="COLUMN", help="default: text")
    parser.add_argument("--label", default="label", metavar="COLUMN", help="default: label")
    parser.add_argument("--epochs", type=float, default=1.0, metavar="N", help="default: 1")
    parser.add_argument("--image", help="default: $SUBLET_FINETUNE_IMAGE, or ours")
    course = add_job_options(parser, PRESET)["course"]
    course.add_argument("-d", "--detach", action="store_true", help="print the id and leave")
    course.add_argument("-y", "--yes", action="store_true", help="submit without asking")
    options = with_json(with_broker(parser)).parse_args(argv)
    from sublet.spec import JobSpec
    from sublet.transfers import InputError
    from sublet.units import UnitError

    with open_client(options) as client:

        def run(**job_options: Any) -> "Job":
            return agreed(client, JobSpec(**job_options), yes=options.yes)

        try:
            with redirect_stdout(sys.stderr):
                job = submit_finetuning(
                    options.base,
                    options.data,
                    text=options.text,
                    label=options.label,
                    epochs=options.epochs,
                    image=options.image,
                    run=run,
                    **given_options(options),
                )
        except DataError as error:
            raise CommandError(str(error), "nothing was submitted; correct the data") from error
        except (UnitError, InputError):
            raise  # as of `sublet run`: they name an option
        except ValueError as error:
            raise CommandError(str(error)) from error
    with open_client(options) as client:
        return result(client.job(job.id), detach=options.detach, as_json=options.json)
