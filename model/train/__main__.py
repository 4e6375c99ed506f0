"""`python -m model.train STAGE --folder RUN ...`: trains the bundled checkpoint, stage by stage.

    vae        images, then clips (with `--start-from` a checkpoint folder, clips alone); RUN/checkpoint/vae with
               measured latent statistics
    films      RUN/films_<frames>: encoded clips for the DiT
    dit        the DiT and the text encoder on a `--mix` of RUN/films_<frames>: mostly images first, then mostly
               whole segments, with `--start-from` the first state (or a checkpoint folder)
    clips      RUN/clips_<frames>: the same of a folder of `--videos` with captions, encoded by the autoencoder of
               `--checkpoint`
    lora       RUN/lora/<name>.safetensors: a LoRA for `--checkpoint`, learnt from RUN/clips_<frames>
    distill    the few-step LoRA: guidance first, then (with `--jump`) fewer steps; of the DiT's state, or of
               `--checkpoint` on RUN/clips_<frames>
    pairs      RUN/pairs_<latent frames>: coarse and fine latents for refinement
    refine     the refinement LoRA
    decoder    goes on with the autoencoder's decoder alone; latents, and all that was learnt on them, stay valid
    pack       RUN/checkpoint, or the folder `--to`, with everything there is
    sheet      RUN/sheets/*.png: samples to look at
    evaluate   RUN/evaluation_<state>: what a DiT state draws with guidance from unseen prompts and given images,
               measured as `longtake evaluate` measures a checkpoint folder

Every stage resumes from its state in RUN under the same command and stops after `--minutes`. A line each 50
steps shows progress, <state>.losses.png the loss so far, and with `--sheet-every N` RUN/sheets what the average of the
weights draws. `torchrun --nproc-per-node N -m model.train ...` shares the steps of `dit`, `lora`, `distill`
and `refine` among N processes; `--mix` and `--clips` are then for each of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
from pathlib import Path

import torch

from model import world
from model.checkpoint import load_vae
from model.errors import ModelError
from model.evaluate import Renderer, Sampling, measure_image, measure_text, table
from model.generate import Models
from model.sampling import base_schedule
from model.text import TextEncoder
from model.train import adapters, clips, films, finetune
from model.train import vae as vae_stage
from model.train.dit import SHIFT, Generator, Part, Samples, Shape, new_generator, sample, train_dit
from model.train.films import Cache
from model.train.flags import parser
from model.train.loop import Plan, load_average, processes, together
from model.train.pack import write_dit, write_scheduler, write_vae
from model.train.sheet import write_sheet
from model.vae import VAE


def log(line: str) -> None:
    if processes()[0] == 0:
        print(datetime.datetime.now().strftime("%H:%M:%S"), line, flush=True)


def plan_of(args: argparse.Namespace, average: float = 0.998) -> Plan:
    return Plan(steps=args.steps, rate=args.rate, final_rate=args.final_rate, minutes=args.minutes, average=average)


def checkpoint_vae(args: argparse.Namespace) -> VAE:
    return load_vae(args.checkpoint or args.folder / "checkpoint", device=args.device, dtype=torch.float32)


def trained_generator(args: argparse.Namespace) -> Generator:
    """The averaged weights of the newest DiT state that `--state` names."""
    generator = new_generator(args.width, args.depth, args.seed)
    load_average(generator, args.folder / f"{args.state}.safetensors")
    return generator.to(args.device).requires_grad_(False)


def samples_of(args: argparse.Namespace) -> Samples | None:
    if not args.sheet_every:
        return None
    return Samples(args.sheet_every, checkpoint_vae(args), args.folder / "sheets", args.guidance)


def run_vae(args: argparse.Namespace) -> None:
    start = None if args.start_from is None else Path(args.start_from)
    if start is None:
        image_plan = Plan(steps=args.image_steps, rate=2e-3, final_rate=4e-4, average=0.995, minutes=args.minutes)
        vae_stage.train_images(args.folder, image_plan, args.base_dim, args.seed, log, device=args.device)
    vae = vae_stage.train_clips(
        args.folder,
        plan_of(args, 0.99),
        args.base_dim,
        args.seed,
        log,
        device=args.device,
        clips=args.clips,
        start_from=start,
    )
    load_average(vae, args.folder / "vae.safetensors")
    write_vae(vae_stage.with_measured_latents(vae), args.folder / "checkpoint")


def run_films(args: argparse.Namespace) -> None:
    films.build_cache(checkpoint_vae(args), args.folder / f"films_{args.frames}", args.seed, args.clips, args.frames)


def run_dit(args: argparse.Namespace) -> None:
    mix = [Part(args.folder / f"films_{frames}", Shape(clips, (frames + 3) // 4), w) for frames, clips, w in args.mix]
    train_dit(
        args.folder,
        args.state,
        mix,
        plan_of(args, 0.997),
        width=args.width,
        depth=args.depth,
        seed=args.seed,
        start_from=args.start_from,
        device=args.device,
        checkpointing=args.checkpointing,
        compiled=args.compile,
        learn_text=not args.keep_text,
        samples=samples_of(args),
        log=log,
    )


def run_clips(args: argparse.Namespace) -> None:
    height_px, width_px = args.size
    cut = clips.Cut(args.frames, args.fps, height_px, width_px)
    videos = clips.captioned_videos(args.videos, args.captions)
    count = clips.build_clips(checkpoint_vae(args), args.folder / f"clips_{args.frames}", videos, cut, log)
    log(f"{count} clips of {args.frames} frames")


def run_lora(args: argparse.Namespace) -> None:
    file = finetune.train_lora(
        args.folder,
        args.checkpoint,
        Cache(args.folder / f"clips_{args.frames}"),
        plan_of(args, 0.99),
        Shape(args.clips, (args.frames + 3) // 4),
        name=args.name,
        rank=args.rank,
        seed=args.seed,
        device=args.device,
        checkpointing=args.checkpointing,
        samples=samples_of(args),
        log=log,
    )
    log(f"{file}")


def teacher_of(args: argparse.Namespace, cache: Cache) -> Generator:
    """The transformer of `--checkpoint`, or else of the DiT's state."""
    if args.checkpoint is None:
        return trained_generator(args)
    return finetune.checkpoint_generator(args.checkpoint, finetune.captions_of(cache), args.device)


def run_distill(args: argparse.Namespace) -> None:
    cache = Cache(args.folder / f"{'clips' if args.checkpoint else 'films'}_{args.frames}")
    shape = Shape(args.clips, (args.frames + 3) // 4)
    student, teacher = (teacher_of(args, cache) for _ in range(2))
    student.dit.gradient_checkpointing = args.checkpointing
    adapters.train_distilled(
        args.folder,
        student,
        teacher,
        cache,
        plan_of(args, 0.99),
        shape,
        guidance=args.guidance,
        jump=args.jump,
        rank=args.rank,
        seed=args.seed,
        compiled=args.compile,
        log=log,
    )


def run_pairs(args: argparse.Namespace) -> None:
    folder = args.folder / f"pairs_{args.latent_frames}"
    adapters.build_pairs(checkpoint_vae(args), folder, args.seed, args.clips, args.latent_frames)


def run_refine(args: argparse.Namespace) -> None:
    pairs = [args.folder / f"pairs_{frames}" for frames in args.latent_frames]
    adapters.train_refinement(
        args.folder,
        trained_generator(args),
        pairs,
        plan_of(args, 0.99),
        args.tokens,
        rank=args.rank,
        seed=args.seed,
        log=log,
    )


def run_decoder(args: argparse.Namespace) -> None:
    plan = plan_of(args, 0.99)
    vae = vae_stage.train_decoder(args.folder, checkpoint_vae(args), plan, args.seed, log, args.compile)
    load_average(vae, args.folder / "decoder.safetensors")
    write_vae(vae, args.folder / "checkpoint")


def run_pack(args: argparse.Namespace) -> None:
    source, target = args.folder / "checkpoint", args.to or args.folder / "checkpoint"
    write_dit(trained_generator(args), target)
    write_scheduler(target)
    if target != source:
        shutil.copytree(source / "vae", target / "vae", dirs_exist_ok=True)
    for file in sorted((args.folder / "lora").glob("*.safetensors")):
        (target / "lora").mkdir(exist_ok=True)
        shutil.copyfile(file, target / "lora" / file.name)


def run_sheet(args: argparse.Namespace) -> None:
    """Text samples of the plain captions of eight held-out films, one row each."""
    vae, generator = checkpoint_vae(args), trained_generator(args)
    scenes = [world.draw_film(i, held_out=args.held_out, two_shapes=0.25).scene for i in range(900, 908)]
    prompts = [world.caption(scene) for scene in scenes]
    latents = sample(
        generator, prompts, (args.frames + 3) // 4, seed=args.seed, steps=args.steps, guidance=args.guidance
    )
    with torch.no_grad():
        videos = [vae.decode(one)[0] for one in latents.split(1)]
    write_sheet(videos, args.folder / "sheets" / f"{args.state}_{args.frames}.png")
    for prompt in prompts:
        log(prompt)


def run_evaluate(args: argparse.Namespace) -> None:
    generator, folder = trained_generator(args), args.folder / f"evaluation_{args.state}"
    models = Models(generator.dit, checkpoint_vae(args), torch.device(args.device), torch.float32)
    text = TextEncoder(generator.prompter.tokenizer, generator.prompter.encoder)
    sampling = Sampling(base_schedule(args.steps, SHIFT), args.guidance, segment_frames=args.frames)
    renderer = Renderer(models, text, sampling)
    result = {
        "text": measure_text(renderer, args.clips, args.seed, folder, log),
        "image": measure_image(renderer, args.clips, args.seed, folder, log),
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result), flush=True)


STAGES = {
    "vae": run_vae,
    "films": run_films,
    "clips": run_clips,
    "dit": run_dit,
    "lora": run_lora,
    "distill": run_distill,
    "pairs": run_pairs,
    "refine": run_refine,
    "decoder": run_decoder,
    "pack": run_pack,
    "sheet": run_sheet,
    "evaluate": run_evaluate,
}


def main() -> None:
    args = parser(__doc__).parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with together():
            STAGES[args.stage](args)
    except ModelError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
