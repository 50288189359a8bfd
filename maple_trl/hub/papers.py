"""The papers whose methods are implemented here, as trainers and cards cite them."""

from __future__ import annotations


MAPLE = {
    "title": "MAPLE: Modality-Aware Post-training and Learning Ecosystem",
    "id": "2602.11596",
    "citation": """\
@article{verma2026maple,
    title  = {{MAPLE: Modality-Aware Post-training and Learning Ecosystem}},
    author = {Nikhil Verma and Minjung Kim and JooYoung Yoo and Kyung-Min Jin and Manasa Bharadwaj and Kevin Ferreira and
              Ko Keun Kim and Youngjoon Kim},
    year   = 2026,
    eprint = {arXiv:2602.11596},
}""",
}
AVATAR = {
    "title": "AVATAR: Reinforcement Learning to See, Hear, and Reason Over Video",
    "id": "2508.03100",
    "citation": """\
@article{kulkarni2025avatar,
    title  = {{AVATAR: Reinforcement Learning to See, Hear, and Reason Over Video}},
    author = {Yogesh Kulkarni and Pooyan Fazli},
    year   = 2025,
    eprint = {arXiv:2508.03100},
}""",
}
TRL_CITATION = """\
@software{vonwerra2020trl,
    title   = {{TRL: Transformers Reinforcement Learning}},
    author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and Lambert,
               Nathan and Huang, Shengyi and Rasul, Kashif and Gallou{\\'e}dec, Quentin},
    license = {Apache-2.0},
    url     = {https://github.com/huggingface/trl},
    year    = {2020}
}"""
