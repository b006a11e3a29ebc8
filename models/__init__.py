"""Tensors in, tensors out: no files, no process groups, no clock, no environment.

Letters of the shapes, here and everywhere:

    B  clips in a batch        H W  pixels               C  token width (C = A D)
    T  frames in time          h w  patches              A  attention heads
    V  cameras                 t    tubelets in time     D  width of one head
    N  tokens                  P    LiDAR points         R  rays,  S  samples on a ray
    n  tokens left visible

    config.py        the sections of a run config that describe encoder and objectives (imports no torch)
    batch.py         Batch and Losses, the two nouns that cross the border to the trainer
    attention.py     one attention over packed sequences and its backends
    layers.py        blocks          positions.py  sin-cos, rotary and learned positions  masking.py  what is hidden
    encoder.py       the video ViT   decoders.py   completion of one view, or of one beside another
    clouds.py        geometry of point clouds, for the workers          points.py     the LiDAR point encoder
    contrast.py      InfoNCE over all ranks' pairs          peers.py      what a loss may know of other ranks
    geometry.py      motion, cameras, voxels, reading between cells      volumes.py    images lifted into voxels
    temporal.py      a volume from its neighbours in time   rendering.py  colours and depths along rays
    images.py        pixels for the encoder and for people                        rasters.py     shapes as cells of a map
    polylines.py     lines of a map as points              wireframes.py  3D boxes drawn on images and from above
    pretraining.py   one encoder under a weighted list of objectives: the module that is trained
    objectives/      what an objective is, and one paper or downstream task a file       heads/        of downstream tasks
    layouts/         encoders under the names of others: timm, DINOv2, VideoMAE, transformers, CroCo
    official_croco.py  CroCo's whole model in and out     flops.py  operations that a step needs
"""
