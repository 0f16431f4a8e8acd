"""Write the demo data set: `data/train.json` and `data/eval.json` at the repository root.

A data set a very small model learns from scratch in a minute: short facts, each asked in several ways.
The evaluation records ask for facts that training holds too, but in a wording or an order in which training
does not ask for this fact. A right answer there is generalisation, not recall of a line.
Choices follow a hash of the record's text, so the files come out byte for byte the same on any machine.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 1234
EVAL_RECORDS = 200
# A held-out question is fair only while training still asks for its fact in this many other ways.
MIN_TRAIN_PER_FACT = 3
DATA_DIR = Path(__file__).resolve().parents[1] / "data"

# One block per family: "# " the answer, given a fact "a=b" ({A} is {a} with a capital letter); "? " the ways
# to ask, separated by " / "; then the facts. "a<>b" holds both ways; "turned round": the block above as b=a.
FACTS = """
# The capital of {a} is {b}.
? What is the capital of {a}? / Which city is the capital of {a}? / Name the capital of {a}.
? Can you tell me the capital of {a}? / I forgot the capital of {a}. What is it?
France=Paris; Germany=Berlin; Italy=Rome; Spain=Madrid; Portugal=Lisbon; Greece=Athens; Cuba=Havana
Austria=Vienna; Poland=Warsaw; Hungary=Budapest; Norway=Oslo; Sweden=Stockholm; Finland=Helsinki
Denmark=Copenhagen; Ireland=Dublin; England=London; Russia=Moscow; Japan=Tokyo; China=Beijing; India=New Delhi
Egypt=Cairo; Kenya=Nairobi; Canada=Ottawa; Peru=Lima; Thailand=Bangkok
# {a} is a city in {b}.
? In which country is {a}? / Where is the city of {a}? / Which country does {a} belong to?
? Can you tell me where {a} is? / Which country do I visit if I travel to {a}?
turned round
# People in {a} speak {b}.
? What language do people speak in {a}? / Which language is spoken in {a}? / Tell me the language of {a}.
? What is the language of {a}? / I travel to {a}. Which language will I hear?
France=French; Germany=German; Italy=Italian; Spain=Spanish; Portugal=Portuguese; Greece=Greek; Poland=Polish
Hungary=Hungarian; Norway=Norwegian; Sweden=Swedish; Finland=Finnish; Denmark=Danish; England=English
Russia=Russian; Japan=Japanese; China=Chinese; Egypt=Arabic; Thailand=Thai
# The opposite of {a} is {b}.
? What is the opposite of {a}? / Name the opposite of {a}. / Which word means the opposite of {a}?
? Can you tell me the opposite of {a}? / I need a word that is the opposite of {a}.
hot<>cold; big<>small; fast<>slow; happy<>sad; old<>young; light<>dark; open<>closed; full<>empty; high<>low
wet<>dry; loud<>quiet; strong<>weak; early<>late
# A baby {a} is called a {b}.
? What is a baby {a} called? / What do you call a young {a}? / What is the name for a baby {a}?
? Which word do we use for a young {a}? / How do people call the baby of a {a}?
dog=puppy; cat=kitten; cow=calf; horse=foal; sheep=lamb; pig=piglet; duck=duckling; goose=gosling; bear=cub
deer=fawn; goat=kid; frog=tadpole; hen=chick; kangaroo=joey; swan=cygnet; rabbit=bunny
# A {a} says {b}.
? What sound does a {a} make? / What does a {a} say? / Which sound do you hear from a {a}?
? How does a {a} sound? / What noise does a {a} make?
dog=woof; cat=meow; cow=moo; horse=neigh; sheep=baa; pig=oink; duck=quack; lion=roar; hen=cluck; frog=ribbit
snake=hiss; bee=buzz; wolf=howl; mouse=squeak; bird=tweet; donkey=hee-haw
# A {a} lives in {b}.
? Where does a {a} live? / What is the home of a {a}? / In what place does a {a} live?
? Where can I find a {a}? / Tell me where a {a} lives.
bird=a nest; bee=a hive; spider=a web; horse=a stable; dog=a kennel; pig=a sty; bear=a cave; rabbit=a burrow
hen=a coop; camel=the desert; monkey=the jungle; shark=the sea; frog=a pond
# The color of {a} is {b}.
? What color is {a}? / Which color does {a} have? / Tell me the color of {a}. / What is the color of {a}?
? I want to paint {a}. Which color do I need?
grass=green; snow=white; the sky=blue; a cherry=red; coal=black; milk=white; a lemon=yellow; a banana=yellow
a carrot=orange; the sun=yellow; chocolate=brown; a strawberry=red; a plum=purple; a flamingo=pink
a cucumber=green; an elephant=gray; the sea=blue; a crow=black; wood=brown; a polar bear=white
a fire truck=red; a pumpkin=orange
# One {a}, two {b}.
? What is the plural of {a}? / What is the plural form of the word {a}? / Tell me the plural of {a}.
? What do I call more than one {a}? / Here is one {a}. There are two what?
cat=cats; dog=dogs; house=houses; box=boxes; child=children; mouse=mice; foot=feet; tooth=teeth; man=men
woman=women; goose=geese; baby=babies; city=cities; leaf=leaves; wolf=wolves; bus=buses; knife=knives
book=books; tree=trees; sheep=sheep; fox=foxes; lady=ladies; star=stars; car=cars
# Today I {a}, yesterday I {b}.
? What is the past tense of {a}? / What is the past form of the verb {a}? / Tell me the past tense of {a}.
? Today I {a}. What did I do yesterday? / How do I say {a} in the past?
go=went; see=saw; eat=ate; run=ran; sing=sang; write=wrote; drink=drank; take=took; give=gave; make=made
come=came; find=found; swim=swam; fly=flew; buy=bought; think=thought; sleep=slept; play=played; walk=walked
jump=jumped; bring=brought; know=knew; speak=spoke; fall=fell; win=won
# After {a} comes {b}.
? What comes after {a}? / What follows {a}? / What is next after {a}? / It is {a} now. What comes next?
? Tell me what comes after {a}.
Monday=Tuesday; Tuesday=Wednesday; Wednesday=Thursday; Thursday=Friday; Friday=Saturday; Saturday=Sunday
Sunday=Monday; January=February; February=March; March=April; April=May; May=June; June=July; July=August
August=September; September=October; October=November; November=December; December=January; spring=summer
summer=autumn; autumn=winter; winter=spring
# {a} is a month of {b}.
? Which season is {a} in? / In what season is {a}? / Tell me the season of {a}.
? To which season does {a} belong? / It is {a} now. Which season is it?
December=winter; January=winter; February=winter; March=spring; April=spring; May=spring; June=summer
July=summer; August=summer; September=autumn; October=autumn; November=autumn
# {a} is a country in {b}.
? On which continent is {a}? / Which continent does {a} belong to? / Name the continent of {a}.
? In what part of the world is {a}? / Tell me on which continent I find {a}.
France=Europe; Germany=Europe; Italy=Europe; Spain=Europe; Greece=Europe; Poland=Europe; Norway=Europe
Japan=Asia; China=Asia; India=Asia; Thailand=Asia; Egypt=Africa; Kenya=Africa; Canada=North America
Cuba=North America; Peru=South America; Brazil=South America; Chile=South America
# A {a} has {b} legs.
? How many legs does a {a} have? / What is the number of legs of a {a}? / On how many legs does a {a} walk?
? Count the legs of a {a}. / Tell me how many legs a {a} has.
dog=four; cat=four; horse=four; lion=four; pig=four; camel=four; bird=two; duck=two; hen=two; man=two; bee=six
fly=six; beetle=six; spider=eight; snake=no; fish=no; worm=no
# The number {a} is written {b}.
? How do you write {a} in words? / Write the number {a} as a word. / What is the word for the number {a}?
? Spell out the number {a}. / How do we read the number {a}?
1=one; 2=two; 3=three; 4=four; 5=five; 6=six; 7=seven; 8=eight; 9=nine; 10=ten; 11=eleven; 12=twelve
13=thirteen; 14=fourteen; 15=fifteen; 16=sixteen; 17=seventeen; 18=eighteen; 20=twenty
# The word {a} is spelled {b}.
? How do you spell {a}? / Spell the word {a}. / Can you spell {a} for me?
? What are the letters of the word {a}? / Which letters do I need to write {a}?
cat=c-a-t; dog=d-o-g; sun=s-u-n; red=r-e-d; hat=h-a-t; pen=p-e-n; cup=c-u-p; bed=b-e-d; box=b-o-x; bus=b-u-s
map=m-a-p; egg=e-g-g; tree=t-r-e-e; milk=m-i-l-k; book=b-o-o-k
# We use {a} to {b}.
? What do we use {a} for? / What is {a} for? / What can I do with {a}? / Why do people have {a}?
? Tell me the use of {a}.
a knife=cut; a pen=write; a bed=sleep; a chair=sit; a cup=drink; a spoon=eat soup; a broom=sweep
a key=open doors; a clock=tell the time; a lamp=make light; an umbrella=stay dry; a stove=cook
a boat=cross water; soap=wash; a book=read; a ball=play; a camera=take pictures; money=pay
# {A} works in a {b}.
? Where does {a} work? / In what place does {a} work? / What is the workplace of {a}?
? Where can I meet {a} at work? / Tell me where {a} works.
a teacher=school; a doctor=hospital; a nurse=hospital; a farmer=field; a cook=kitchen; a baker=bakery
a judge=court; an actor=theater; a gardener=garden; a clown=circus; a zookeeper=zoo
# In {a} the president of the United States was {b}.
? Who was president of the United States in {a}? / Name the president of the United States in {a}.
? Who led the United States in {a}? / Tell me who was the American president in {a}.
? Which president did the United States have in {a}?
1790=George Washington; 1863=Abraham Lincoln; 1940=Franklin Roosevelt; 1950=Harry Truman
1955=Dwight Eisenhower; 1962=John Kennedy; 1985=Ronald Reagan; 2012=Barack Obama
# {b}
? How do I {a}? / Tell me how to {a}. / What is the best way to {a}? / I want to {a}. What do I do?
? Can you explain how to {a}?
make tea=Put a tea bag in a cup and add hot water.; stay healthy=Eat well, sleep well and move every day.
boil an egg=Cook it in hot water for eight minutes.; plant a tree=Dig a hole, put in the tree and water it.
make a friend=Smile, say hello and listen well.; learn a language=Practice a little every day.
clean a window=Wipe the glass with soap and water.; save money=Spend less than you earn.
# {b}
? How does {a} work? / Explain how {a} works. / Tell me how {a} works. / Can you explain how {a} works?
? Do you know how {a} works? / I want to know how {a} works.
a telescope=A telescope uses lenses or mirrors to gather light and makes far things look near.
a fridge=A fridge moves heat from the inside to the outside, so the food stays cold.
a bike=A bike moves when your feet turn the pedals and the chain turns the wheel.
a sail=A sail catches the wind, and the wind pushes the boat over the water.
# {b}
? Why do {a}? / Tell me why {a}. / Can you explain why {a}? / Do you know why {a}? / I want to know why {a}.
? What is the reason that {a}?
birds migrate south for the winter=Birds fly south because it is warm there and they find more food.
people sleep=People sleep because the body and the mind need rest.
plants need water=Plants drink water with their roots and need it to grow.
bees visit flowers=Bees visit flowers to gather sweet nectar for honey.
# {b}
? Write a short poem about {a}. / Please write a poem about {a}. / I would like a short poem about {a}.
? Can you write a poem about {a}? / Please write a short poem about {a}. / Tell me a poem about {a}.
a wise frog=A wise old frog sat on a log, and shared his wisdom with a dog.
the moon=The moon is bright, it fills the night, and gives the sea a silver light.
a little cat=A little cat sat on a mat, and dreamed about a bigger hat.
# {b}
? Explain {a} to a 6 year old in a few sentences. / Explain {a} to a child. / Tell a small child about {a}.
? Can you explain {a} to a child in simple words? / Explain {a} in a few sentences.
the moon landing=In 1969 people flew to the moon in a rocket. They walked on it and came home safely.
gravity=Gravity pulls things down. It is why a ball falls to the ground.
day and night=The earth turns like a ball. It is day on the side that looks at the sun.
# {b}
? Please tell me about {a} in a few sentences. / Tell me about {a}. / What do you know about {a}?
? Can you say something about {a}? / Please tell me about {a}. / What can you tell me about {a}?
Microsoft=Microsoft is a company that makes software. Bill Gates and Paul Allen started it in 1975.
Mozart=Mozart was a composer from Austria. He wrote music as a small child.
the Nile=The Nile is a very long river in Africa. It flows through Egypt to the sea.
# {b}
? {a}! / {a}, my friend! / {a}, dear assistant! / {a} from all of us!
Hello=Hello! How can I help you?; Good morning=Good morning! I hope you slept well.
Thank you=You are welcome.; Goodbye=Goodbye! See you soon.; Good night=Good night! Sleep well.
Happy birthday=How kind of you! Let us eat some cake.
"""

KINDS = {
    "an animal": "a dog, a cat, a horse, a lion, a wolf, a cow",
    "a flower": "a rose, a tulip, a daisy, a lily, an orchid",
    "a fruit": "an apple, a banana, a pear, a peach, a cherry",
    "a tool": "a hammer, a saw, a drill, a shovel, an axe",
    "a vehicle": "a car, a bus, a train, a truck, a plane",
}
SIZES = ("an ant", "a bee", "a mouse", "a rabbit", "a dog", "a cow", "a whale")  # from small to big
COMPARISONS = ("Which is {word}, {x} or {y}?", "Tell me which one is {word}: {x} or {y}.")
# The built-in English prompts of prompt_eval.py: kept out of training, so that the demo shows no recall.
BUILT_IN_QUESTIONS = (
    "Please tell me about Microsoft in a few sentence?",
    "Explain the moon landing to a 6 year old in a few sentences.",
    "Write a short poem about a wise frog.",
    "Who was president of the United States in 1955?",
    "How does a telescope work?",
    "Why do birds migrate south for the winter?",
)
SUMS = ("What is {x} plus {y}?", "How much is {x} plus {y}?", "Add {x} and {y}.", "Tell me {x} plus {y}.")


@dataclass(frozen=True)
class Record:
    """One question with a good and a worse answer, and the fact it asks for."""

    fact: str
    question: str
    chosen: str
    rejected: str

    def as_json(self) -> str:
        """Return the record as one line of the data file."""
        prompt = f"Human: {self.question} Assistant:"
        record = {"prompt": prompt, "chosen": self.chosen, "rejected": self.rejected}
        return json.dumps(record, ensure_ascii=False)


def hash_key(text: str) -> str:
    """Return a fixed pseudo-random sort key for `text`."""
    return hashlib.sha256(f"{SEED}:{text}".encode()).hexdigest()


def table_records() -> Iterator[Record]:
    """Yield every fact of `FACTS` in every way to ask for it; rejected is another fact's answer."""
    facts: list[list[str]] = []
    for block in FACTS.split("\n# ")[1:]:
        answer, *lines = block.strip().split("\n")
        questions = [q for line in lines if line[0] == "?" for q in line[2:].split(" / ")]
        if lines[-1] == "turned round":
            facts = [[b, a] for a, b in facts]
        else:
            items = [item for line in lines if line[0] != "?" for item in line.split("; ")]
            facts = [item.replace("<>", "=").split("=") for item in items]
            facts += [item.split("<>")[::-1] for item in items if "<>" in item]
        for (a, b), question in itertools.product(facts, questions):
            asked = question.format(a=a)
            wrong = min((other for _, other in facts if other != b), key=lambda o: hash_key(asked + o))
            chosen, rejected = (answer.format(a=a, A=a.capitalize(), b=value) for value in (b, wrong))
            yield Record(f"{answer}{a}", asked, chosen, rejected)


def choice_records() -> Iterator[Record]:
    """Yield "is a rose a flower or a tool?" and "which is bigger, an ant or a cow?" in both orders."""
    for kind, things in KINDS.items():
        for thing, other, swap in itertools.product(things.split(", "), KINDS, (False, True)):
            if other != kind:
                first, second = (other, kind) if swap else (kind, other)
                answers = (f"{thing.capitalize()} is {k}." for k in (kind, other))
                yield Record(thing, f"Is {thing} {first} or {second}?", *answers)
    for (x, y), template in itertools.product(itertools.permutations(SIZES, 2), COMPARISONS):
        small, big = sorted((x, y), key=SIZES.index)
        for word, right, wrong in (("bigger", big, small), ("smaller", small, big)):
            answers = (f"{one.capitalize()} is {word}." for one in (right, wrong))
            yield Record(f"{small} {big}", template.format(word=word, x=x, y=y), *answers)


def sum_records() -> Iterator[Record]:
    """Yield sums of two small numbers; rejected is off by a little."""
    for (x, y), template in itertools.product(itertools.product(range(1, 6), repeat=2), SUMS):
        asked = template.format(x=x, y=y)
        wrong = x + y + min((-1, 1, 2), key=lambda off: hash_key(f"{asked}{off}"))
        chosen, rejected = (f"{x} plus {y} is {total}." for total in (x + y, wrong))
        yield Record(f"{min(x, y)}+{max(x, y)}", asked, chosen, rejected)


def make_records() -> tuple[list[Record], list[Record]]:
    """Return the training and the evaluation records, both in a fixed shuffled order."""
    records = list(itertools.chain(table_records(), choice_records(), sum_records()))
    # The built-in questions come first, so that they are held out.
    records.sort(key=lambda r: (r.question not in BUILT_IN_QUESTIONS, hash_key(r.question)))
    left = Counter(record.fact for record in records)
    train, evaluation = [], []
    for record in records:
        if len(evaluation) < EVAL_RECORDS and left[record.fact] > MIN_TRAIN_PER_FACT:
            left[record.fact] -= 1
            evaluation.append(record)
        else:
            train.append(record)
    return sorted(train, key=lambda r: hash_key(f"train {r.question}")), evaluation


def write_records(records: list[Record], path: Path) -> None:
    """Write a JSON list with one record per line, so that diffs stay readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("[\n" + ",\n".join(record.as_json() for record in records) + "\n]\n").encode())


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=DATA_DIR, help="folder for both files")
    output_dir = parser.parse_args().output_dir
    for name, records in zip(("train", "eval"), make_records(), strict=True):
        write_records(records, output_dir / f"{name}.json")
        print(f"{output_dir / name}.json: {len(records)} records")


if __name__ == "__main__":
    main()
