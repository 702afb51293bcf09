"""The published benchmarks: the files, questions and scoring rules of each.

air_bench       AIR-Bench Foundation
air_bench_chat  AIR-Bench Chat, and its judge
mmmu            MMMU
mmmu_rules      MMMU's own rules for reading an answer
scienceqa       ScienceQA
subtitles       the subtitles of a video
video_mme       Video-MME
"""
