# SPDX-License-Identifier: Apache-2.0
"""The subjects of MMLU and C-Eval with their classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptneox.config.errors import FileError
from gptneox.config.files import read_json


@dataclass(frozen=True)
class Subject:
    """The class of a subject, and its Chinese name for Chinese prompts."""

    group: str
    chinese: str = ""


_MMLU_GROUPS = {
    "STEM": """
        abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics
        electrical_engineering elementary_mathematics high_school_biology high_school_chemistry
        high_school_computer_science high_school_mathematics high_school_physics
        high_school_statistics machine_learning
    """,
    "humanities": """
        formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy
        prehistory professional_law world_religions
    """,
    "social sciences": """
        econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology
        human_sexuality professional_psychology public_relations security_studies sociology
        us_foreign_policy
    """,
    "other": """
        anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging
        management marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology
    """,
}
MMLU_SUBJECTS = {
    name: Subject(group) for group, names in _MMLU_GROUPS.items() for name in names.split()
}

_CEVAL_GROUPS = {
    "STEM": """
        advanced_mathematics 高等数学
        college_chemistry 大学化学
        college_physics 大学物理
        college_programming 大学编程
        computer_architecture 计算机组成
        computer_network 计算机网络
        discrete_mathematics 离散数学
        electrical_engineer 注册电气工程师
        high_school_biology 高中生物
        high_school_chemistry 高中化学
        high_school_mathematics 高中数学
        high_school_physics 高中物理
        metrology_engineer 注册计量师
        middle_school_biology 初中生物
        middle_school_chemistry 初中化学
        middle_school_mathematics 初中数学
        middle_school_physics 初中物理
        operating_system 操作系统
        probability_and_statistics 概率统计
        veterinary_medicine 兽医学
    """,
    "Social Science": """
        business_administration 工商管理
        college_economics 大学经济学
        education_science 教育学
        high_school_geography 高中地理
        high_school_politics 高中政治
        mao_zedong_thought 毛泽东思想和中国特色社会主义理论体系概论
        marxism 马克思主义基本原理
        middle_school_geography 初中地理
        middle_school_politics 初中政治
        teacher_qualification 教师资格
    """,
    "Humanities": """
        art_studies 艺术学
        chinese_language_and_literature 中国语言文学
        high_school_chinese 高中语文
        high_school_history 高中历史
        ideological_and_moral_cultivation 思想道德修养与法律基础
        law 法学
        legal_professional 法律职业资格
        logic 逻辑学
        middle_school_history 初中历史
        modern_chinese_history 近代史纲要
        professional_tour_guide 导游资格
    """,
    "Other": """
        accountant 注册会计师
        basic_medicine 基础医学
        civil_servant 公务员
        clinical_medicine 临床医学
        environmental_impact_assessment_engineer 环境影响评价工程师
        fire_engineer 注册消防工程师
        physician 医师资格
        plant_protection 植物保护
        sports_science 体育学
        tax_accountant 税务师
        urban_and_rural_planner 注册城乡规划师
    """,
}
CEVAL_SUBJECTS = {
    line.split()[0]: Subject(group, line.split()[1])
    for group, lines in _CEVAL_GROUPS.items()
    for line in lines.strip().splitlines()
}

# Source: C-Eval Hard. MMLU subjects of the same names count as hard, too.
HARD_SUBJECTS = frozenset(
    (
        "advanced_mathematics",
        "discrete_mathematics",
        "probability_and_statistics",
        "college_chemistry",
        "college_physics",
        "high_school_mathematics",
        "high_school_chemistry",
        "high_school_physics",
    )
)


def read_mapping(path: Path, key: str) -> dict[str, Subject]:
    """Read a subject_mapping.json, as it comes with the downloads of MMLU, C-Eval and CMMLU.

    Args:
        path: holds an object of subjects, directly or under `key`. The entry of a subject is a
            text or a list of texts: the last one is its class, the first one with Chinese
            characters its Chinese name. A list of subjects without entries is accepted, too.
        key: such as "mmlu_all_sets".

    Raises:
        FileError: not JSON, or not of this form.
    """
    raw: Any = read_json(path)
    raw = raw.get(key, raw)
    if isinstance(raw, list):
        raw = dict.fromkeys(raw, "")
    if not isinstance(raw, Mapping) or not raw:
        raise FileError(f"{path}: an object of subjects is expected, under {key!r} or directly")
    subjects = {}
    for name, value in raw.items():
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise FileError(
                f"{path}: {name!r} is {json.dumps(value)[:60]}; a text or a list of texts is "
                "expected"
            )
        chinese = next((t for t in texts if any("\u4e00" <= c <= "\u9fff" for c in t)), "")
        group = texts[-1] if texts and texts[-1] not in ("", chinese) else ""
        subjects[str(name)] = Subject(group, chinese)
    return subjects
