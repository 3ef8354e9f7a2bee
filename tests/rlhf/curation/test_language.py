"""The language of a prompt's instruction."""

import pytest

from rlhf.curation.language import foreign_language, languages

GERMAN = "Der Schl\u00fcssel liegt unter dem dritten Blumentopf, bitte gie\u00dfe die Tomaten jeden Abend."
SPANISH = "Ayer fuimos al mercado y compramos naranjas, limones y una sandia muy grande para la fiesta."


@pytest.mark.parametrize(("text", "language"), [
    ("was ist die hauptstadt von frankreich?", "de"),
    ("schreibe eine geschichte \u00fcber den hund im wald.", "de"),
    ("Quelle est la couleur du ciel ?", "fr"),
    ("el perro est\u00e1 en la casa y come pan", "es"),
    ("Nous avons mang\u00e9. Merci d'avance pour votre aide, le film est bien.", "fr"),
    ("как дела", "ru"), ("这是什么意思呢", "zh"), ("東京の天気はどうですか", "ja"),
])
def test_other_languages_are_recognised(text: str, language: str) -> None:
    assert foreign_language(text) in (language, "?" if not text.isascii() else language)


@pytest.mark.parametrize("text", [
    "", "ok", "hi", "Bonjour", "what color is the ba-do?", "import numpy as np; x = np.zeros(3)", "2 + 2 = ?",
    "SELECT * FROM t WHERE a = 1", "how to make pasta carbonara al dente", "How do jellyfish mate?",
    "say this two times: ki-bo du-sun drum", "translate 'guten Tag' into English, please", "lol ok thx bye",
    "Was Jesus an extraterrestrial?", "Who was S\u00f8ren, and why do the people of \u00c5rhus remember him?",
])
def test_english_code_and_undecided_texts_are_not_foreign(text: str) -> None:
    assert foreign_language(text) == ""


@pytest.mark.parametrize("text", [
    f"What is this German note about? {GERMAN}", f"Correct the spelling: {SPANISH}", f"{SPANISH * 30}\nSummarise this.",
    f"{SPANISH} Translate into English.", "Translate: 昨天我们去了山上的老寺庙,路上下了一点雨",
    f"{GERMAN}\n\nWhich case is this?",
])
def test_the_instruction_counts_and_not_what_it_is_about(text: str) -> None:
    assert foreign_language(text) == ""


@pytest.mark.parametrize(("text", "language", "found"), [
    ("次の英文を訳してください: The quick brown fox jumps over the lazy dog and runs away", "ja", ""),
    ("Tell me why the leaves turn red in autumn.", "ja", "en"), ("東京都", "ja", ""),
    ("def f(x): return x + 1", "ja", ""),
    ("写一首关于秋天的诗，不要超过五十个字", "ja", "zh"), ("写一首关于秋天的诗，不要超过五十个字", "zh", ""),
    ("暑い日が続きますが、お元気ですか。", "zh", "ja"), ("请解释这句话：The early bird catches the worm.", "zh", ""),
    ("Warum ist der Himmel blau?", "de", ""), ("Why is the sky blue in the evening?", "de", "en"),
    ("Übersetze das ins Deutsche: The quick brown fox jumps over the lazy dog and runs away", "de", ""),
    ("Расскажи мне о море", "ru", ""), ("왜 하늘은 파란가요?", "ko", ""),
])
def test_a_dataset_may_be_in_any_language(text: str, language: str, found: str) -> None:
    assert foreign_language(text, language) == found


def test_the_languages_have_codes() -> None:
    assert {"en", "ja", "zh", "de", "sw"} <= set(languages())


def test_nine_tenths_of_short_prompts_are_told_apart() -> None:
    foreign = """Wie viele Einwohner hat die Stadt Hamburg heute?|Explique-moi comment fonctionne un moteur diesel.
¿Cuál es la capital de Perú y cuántos habitantes tiene?|Escribe un poema corto sobre el mar.
Scrivi una breve storia su un gatto nero.|Come si prepara la pasta alla carbonara?
Skriv en kort dikt om vintern i Norrland.
Escreva um e-mail pedindo desculpas pelo atraso.|Schrijf een kort verhaal over een hond in het bos.
Hur gör man en god äppelkaka?|Hvordan laver man en god suppe til mange mennesker?|Napisz krótki wiersz o jesieni.
Napiš krátkou báseň o zimě.|Írj egy rövid mesét a farkasról.|Kirjoita lyhyt runo metsästä.
Tulis puisi pendek tentang laut.
Bana sonbahar hakkında kısa bir şiir yaz.|Viết một bài thơ ngắn về mùa thu.|Напиши короткое стихотворение об осени.
Напиши функцию на Python, которая сортирует список.|Γράψε ένα μικρό ποίημα για τη θάλασσα.|اكتب قصيدة قصيرة عن البحر
שלום, כתוב שיר קצר על הים|शरद ऋतु पर एक छोटी कविता लिखो|请用Python写一个排序函数。|가을에 대한 짧은 시를 써 주세요"""
    english = """Translate to German: I like apples.|Explain this idiom: Da liegt der Hund begraben.
Is this correct French? Je suis allé au marché hier matin avec ma soeur.|List 5 Spanish verbs|Sushi vs sashimi
Proofread: Ayer fui al cine con mis amigos y vimos una pelicula muy larga.
Explain the joke: 为什么程序员总是分不清万圣节和圣诞节?
What does "Напиши короткое стихотворение об осени" mean?|Name the language: Kirjoita lyhyt runo metsästä.
Fix grammar: Je mange un pomme et je boit du lait tous les matins.|Who wrote Don Quijote de la Mancha?
Rate the sentiment of this review: Das Essen war kalt und der Kellner unfreundlich, nie wieder!|Who is Jürgen Habermas?
Barcelona Madrid train price|Recipe: Wiener Schnitzel mit Kartoffelsalat|Poem about Schadenfreude
SELECT nombre, apellido FROM clientes WHERE pais = 'ES';|次の文の意味は何ですか — what does this mean?
Sentiment? "La película fue aburrida y demasiado larga para los niños.\""""
    others, own = foreign.replace("\n", "|").split("|"), english.replace("\n", "|").split("|")
    found = sum(bool(foreign_language(text)) for text in others)
    wrong = sum(bool(foreign_language(text)) for text in own)
    assert found >= 0.9 * len(others)
    assert found >= 0.9 * (found + wrong)
