"""Train, evaluate and use the models; --help explains."""

from recbole_simdiff.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
