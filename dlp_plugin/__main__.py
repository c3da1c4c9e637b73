"""``python -m dlp_plugin``."""

from dlp_plugin.cli import app

if __name__ == "__main__":
    app()
