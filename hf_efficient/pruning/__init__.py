"""Pruning: heads, neurons, layers, single weights and tokens that matter least leave a model.

    from hf_efficient import PruningConfig, plan, prune
    small = prune(model, PruningConfig(ratio=0.5), calibration=batches)

Files and folders from the ground up; each uses those above it and no other:

    methods, pattern, config    named methods, one table each; what is to be removed, and how it is chosen
    plan                        what stays, as JSON, and what that gives
    cut/                        a model with less in it: units and layers, linears, vocabulary and tokenizer
    price/                      what parts cost: parameters, MACs, or time; what a plan will give
    score/                      how much parts matter: units, layers, single weights; calibration batches
    choose/                     from scores and prices to what stays; whether a ratio can be reached
    fit/                        what stays makes up for what leaves
    gradual/                    all that while training
    weights, search             single weights; layers and units, step by step
    prune, callback             the front: `plan`, `prune`, `PruningCallback`
"""
