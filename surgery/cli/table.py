"""Every command by name: where it is, and what lists of commands say of it. Nothing is imported before it is called."""

from collections.abc import Mapping
from typing import Any

# name -> ("module:function", one line). "op:NAME" is a command made from the operation's own declaration.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "demo": ("surgery.cli.demo:demo", "Graft a small diffusion transformer on real digits, end to end, in minutes."),
    "graft": ("op:graft", "Replace operators of a diffusion transformer and repair the model."),
    "coe": ("op:coe", "Turn a mixture of experts into a Chain-of-Experts, and back."),
    "merge": ("surgery.cli.merge:merge", "Merge a text model into a vision-language model, or models by a YAML file."),
    "cast": ("op:cast", "Store floating-point tensors in another precision."),
    "rename": ("op:rename", "Rename tensors by patterns."),
    "slice": ("op:slice", "Keep, drop and repeat blocks of a model."),
    "extract": ("op:extract", "Take one part out of a pipeline, or one tower out of a model."),
    "scale": ("op:scale", "Multiply chosen tensors by a number."),
    "reshard": ("op:reshard", "Store a checkpoint in files of another size."),
    "sample": ("surgery.cli.evals.images:sample", "Draw images from a class-conditional diffusion transformer."),
    "init": ("op:init", "Make a checkpoint of a known architecture with random weights."),
    "inspect": ("surgery.cli.graph.checkpoint:inspect", "Show what a checkpoint holds, from headers alone."),
    "log": ("surgery.cli.graph.checkpoint:log", "Show how a checkpoint came to be, back to the root."),
    "diff": ("surgery.cli.graph.diff:diff", "Compare two checkpoints tensor by tensor."),
    "replay": ("surgery.cli.graph.replay:replay", "Build a checkpoint again from its record and compare."),
    "verify": ("surgery.cli.graph.checkpoint:verify", "Check every byte of a produced checkpoint against its record."),
    "run": ("surgery.cli.graph.recipe:run", "Carry out the steps of a recipe."),
    "plan": ("surgery.cli.graph.recipe:plan", "Say what a recipe will do and cost, from headers alone."),
    "schema": ("surgery.cli.graph.recipe:schema", "Print the JSON schema of recipes."),
    "completion": ("surgery.cli.completion:completion", "Print a script that lets a shell complete commands."),
}
# name -> (one line, its commands); a command that is given as such a pair is a group inside the group.
Commands = Mapping[str, tuple[str, Any]]
GROUPS: Mapping[str, tuple[str, Commands]] = {
    "lora": (
        "Adapters of low rank, in PEFT's format.",
        {
            "extract": ("op:lora-extract", "Make an adapter of the difference between two models."),
            "apply": ("op:lora-apply", "Merge an adapter into its model."),
        },
    ),
    "train": (
        "Train models by the methods of the toolkit.",
        {
            "coe": ("op:train-coe", "Train a Chain-of-Experts, and its unconverted model with the same budget."),
            "diffusion": ("op:train-diffusion", "Train or finetune a diffusion transformer with its own loss."),
            "classifier": ("op:train-classifier", "Train the small classifier whose features compare images."),
            "scenes": ("op:train-scenes", "Train a small LLaVA to answer where things are in drawn scenes."),
        },
    ),
    "eval": (
        "Measure checkpoints and their outputs.",
        {
            "images": (
                "surgery.cli.evals.images:eval_images",
                "Frechet distance, KID, precision and recall of sampled images.",
            ),
            "vqa": (
                "surgery.cli.evals.vqa:eval_vqa",
                "Ask a vision-language model questions and score its answers by rules.",
            ),
            "compare": ("surgery.cli.evals.vqa:compare", "Compare two evaluations item by item."),
        },
    ),
    "probe": (
        "Look into a model: which parts of it do what.",
        {
            "layers": (
                "surgery.cli.evals.layers:probe_layers",
                "Change one layer at a time and measure what it costs.",
            ),
            "attention": ("surgery.cli.adaptvis.probe:probe_attention", "Which heads carry an answer about a picture."),
            "routing": (
                "surgery.cli.evals.routing:probe_routing",
                "Which experts the routers of a model choose on text.",
            ),
        },
    ),
    "sweep": (
        "Measure many edits of a model without writing them.",
        {
            "merge": (
                "surgery.cli.evals.layers:sweep_merge",
                "Merges at several shares and layers, chosen on held-out items.",
            )
        },
    ),
    "adaptvis": (
        """Steer what a vision-language model looks at, and let checkpoints carry it.

        surgery adaptvis data make -o scenes
        surgery adaptvis tune llava-scenes scenes/val.jsonl -o t.json
        surgery adaptvis attach llava-scenes -o av --from t.json
        surgery adaptvis eval av scenes/test.jsonl --method base,scaling,adapt
        """,
        {
            "attach": ("op:adaptvis-attach", "Attach an attention patch; the weights stay as they are, byte for byte."),
            "tune": ("surgery.cli.adaptvis.tune:tune", "Find alphas and threshold, and what they are worth held out."),
            "ask": ("surgery.cli.adaptvis.ask:ask", "Ask one question about a picture, steered."),
            "verify": ("surgery.cli.adaptvis.verify:verify", "Check that a checkpoint's patch is whole and acts."),
            "eval": (
                "surgery.cli.adaptvis.evaluate:evaluate",
                "Ask where things are, plainly and steered.",
            ),
            "map": ("surgery.cli.adaptvis.maps:draw_map", "Draw where a model looks in a picture when it answers."),
            "analyze": ("surgery.cli.adaptvis.analyze:analyze", "Say what attention to pictures goes with, by layer."),
            "data": (
                """Make or import questions about where things are.

                surgery adaptvis data make -o scenes
                """,
                {
                    "make": ("surgery.cli.adaptvis.data:make", "Draw scenes of simple things and ask about them."),
                    "import": (
                        "Turn published benchmarks into our format.",
                        {
                            "whatsup": ("surgery.cli.adaptvis.data:import_whatsup", "What's Up: Controlled, COCO, VG."),
                            "vsr": ("surgery.cli.adaptvis.data:import_vsr", "VSR: is a statement right?"),
                        },
                    ),
                },
            ),
        },
    ),
    "cache": (
        "Look at the results that are kept, and drop some.",
        {
            "ls": ("surgery.cli.graph.cache:ls", "List the cached results, the longest unused first."),
            "path": ("surgery.cli.graph.cache:path", "Print the folder of the cache, or of one result."),
            "gc": ("surgery.cli.graph.cache:gc", "Remove the longest unused results until the rest fits."),
            "verify": (
                "surgery.cli.graph.cache:verify",
                "Read every byte of the cached results; drop the damaged ones.",
            ),
        },
    ),
    "kernels": (
        "Compile and time the kernels for routed experts.",
        {
            "check": ("surgery.cli.kernels:check", "Compile every kernel for GPUs that are not here and measure it."),
            "bench": ("surgery.cli.kernels:bench", "Time routed experts by every backend that runs here."),
        },
    ),
}
