"""The algorithm of ABM-LoRA (arXiv:2511.19145), on torch and peft alone. Table of contents:

    the boundary loss, Eq. (22), whole            boundary.py     boundary_loss
    its tau: signs of the reference, as bits      boundary.py     Signs
    its w_l^2                                     boundary.py     layer_weight
    its m, and whose signs                        reference.py    calibrate
    the matching, on one page                     match.py        initialize_lora_abm_weights
        its steps                                 descent.py      Descent
        each layer on its own                     closed_form.py  fit_locally
        its settings, and what it reports         settings.py     ABMConfig; report.py  ABMReport
    the gradient's directions, boundaries kept    align.py        initialize_lora_aligned_weights
    G = dL/dW0 of every adapted layer             gradient.py     weight_gradients
    ||G - P(G)||^2 / ||G||^2, information loss    tangent.py      information_loss
    the inputs' principal directions (EVA)        moments.py      Moments
    W0 + s B A as one product                     merged_linear.py; any model's layers made so: swap.py
        its Triton kernels on CUDA                kernels.py      merge, factor_gradients
    both passes of a step as one CUDA graph       step.py         TrainingStep
        whether it can be one, and still is       snapshot.py     Snapshot
    LoRA on a model; its files                    lora.py  add_lora; saving.py; loading.py
    one adapter, and what may be done with it     adapter.py      Adapter
    the proof that adapters take part             checks.py       check_adapters
    what differs between families of models       host.py         Backbone

Around these: hooks.py (how modules are hooked), batches.py (how batches are taken, moved and cut), restore.py (what is
changed for a while is given back), base_change.py (what an initialisation took out of the base weights),
names.py (of modules).
"""
