"""Parts shared by the commands: flags, help texts, files of prompts and answers, signals."""
