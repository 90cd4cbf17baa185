"""Build the wheel with the scripts and recipes of the top folder in it, as `opefo_trl.recipes`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithRecipes(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # a checkout has them in its top folder
            return
        recipes = Path(self.build_lib, "opefo_trl", "recipes")
        shutil.rmtree(recipes, ignore_errors=True)
        shutil.copytree("configs", recipes / "configs")
        for script in ("train.py", "eval.py"):
            shutil.copy(script, recipes / script)
        text = '"""Scripts of `opefo-trl train` and `opefo-trl eval`; recipes in `configs/`."""\n'
        (recipes / "__init__.py").write_text(text)


setup(cmdclass={"build_py": WithRecipes})
