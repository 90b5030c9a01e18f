.PHONY: install test lint results quickstart site clean

install:  ## editable, with everything that tests and lint need
	pip install -c constraints.txt -e ".[dev]"

test:  ## the package, then examples/paper
	pytest
	pytest tests/paper

lint:
	ruff check --fix .
	ruff format .
	mypy

results:  ## tables and figures of docs/results.md and README.md from the records
	python examples/paper/page.py

quickstart:  ## the whole job on the embedded data set
	tokenrec quickstart

site:  ## the documentation as pages that work from the disk
	mkdocs build --strict

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis out-paper tokenrec-quickstart
