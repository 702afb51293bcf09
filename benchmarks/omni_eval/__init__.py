"""ScienceQA, MMMU, Video-MME and AIR-Bench from local copies, asked of any server that speaks OpenAI's API."""
