"""Plans: which layout of a job fits a cluster, how much memory it takes and how long a step is, without running it.

Plain Python: nothing here imports torch, and nothing touches a device. What goes in and what comes out:

    ModelShape      shape.py      the model as numbers; `shape_of(model_config)` reads weft's own ModelConfig
    Job, Layout     layout.py     what is trained per step, and how it is spread over ranks
    Recipe          recipe.py     bytes per parameter, gradient, moment and activation; `WEFT` is this engine's in fp32,
                                  `MEGATRON` mixed precision with fp32 gradients and moments
    Cluster         cluster.py    devices, links and the few calibrated constants; `load_cluster(name or path)` reads
                                  clusters.yaml beside it, or a file of the user's in the same format
    Memory          memory.py     `memory_of_rank(shape, job, layout, recipe, rank) -> Memory`: bytes by kind
    StepTime        step.py       `step_time(shape, job, layout, recipe, cluster) -> StepTime`: seconds by kind
    Space           candidates.py all layouts; `ask.space_of(settings, cluster)` makes it of a settings file
    Plan            search.py     `Planner(space, cluster).search() -> Plan`: what fits, fastest first, and what loses

Times are seconds, sizes bytes, rates per second, unless a name says otherwise. An axis is spread over ranks in the
order of `weft.launch.topology`: tensor innermost, then context, data, pipeline.
"""
