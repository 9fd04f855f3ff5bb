"""Parts that the commands share: flags, files of prompts and answers, signals."""
