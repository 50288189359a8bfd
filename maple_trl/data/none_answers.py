"""Options that say that a question cannot be answered with what is fed, and options that already do."""

from __future__ import annotations

import re

from maple_trl.data.plain_words import plain


NONE_ANSWERS: tuple[str, ...] = (
    "What I was shown does not settle this.",
    "There is no way to tell from this material.",
    "This cannot be told from what was given.",
    "None of it can be confirmed from what is here.",
    "The part of the clip that would tell is not here.",
    "I would be guessing: the decisive signal is absent.",
    "Nothing that I received answers the question.",
    "The needed signal was not supplied.",
    "It remains open with what is at hand.",
    "No option can be supported by what I have.",
    "The clip as given leaves this undecided.",
    "What would answer this was left out.",
    "Too little of the clip is available to say.",
    "Any choice here would be a guess.",
    "The material at hand is silent on this point.",
    "I have no basis for choosing one of the options.",
    "This needs a signal that I was not given.",
    "The question asks about something outside what I can perceive here.",
    "From this excerpt the answer stays unknown.",
    "The signals at hand do not reach that far.",
    "It is impossible to say on this basis.",
    "Not decidable with what has been provided.",
    "What I can see, hear or read says nothing about this.",
    "I cannot verify any of the options.",
    "One of the signals that this depends on is absent.",
    "The answer lies in a part of the recording that is withheld.",
    "More than this would be needed to reply.",
    "I lack the part of the recording that holds the answer.",
    "With these signals alone, nobody could know.",
    "The recording as supplied does not say.",
    "That can be neither seen, heard nor read here.",
    "What is asked for does not appear in what I got.",
    "The clues that this question rests on are not present.",
    "There is nothing here from which to work it out.",
    "I was not given what it takes to answer.",
    "No reply can be justified by this material.",
    "It would take another signal of the clip to know.",
    "This is beyond what the supplied signals reveal.",
    "The options cannot be told apart with what I have.",
    "I do not have what I would need to choose.",
    "The excerpt holds no trace of what is asked.",
    "As presented, the clip gives no answer to this.",
    "An honest reply is that this cannot be known here.",
    "The relevant track is not part of what I received.",
    "Nothing at hand speaks for one option over another.",
    "The supplied signals leave every option equally possible.",
    "Whatever decides this was not passed on to me.",
    "There are no grounds here for an answer.",
    "I must abstain: the deciding clue is not available.",
    "That is not something which this input shows.",
    "The answer is not contained in what was handed over.",
    "Only with the rest of the clip could this be answered.",
    "My view of the clip is too narrow for this question.",
    "On this footing every answer would be invented.",
    "The matter cannot be cleared up with these signals.",
    "Nothing in the given part of the clip bears on this.",
    "What is here permits no conclusion about it.",
    "It cannot be worked out from the signals on hand.",
    "The question goes beyond the material supplied.",
    "A reply would call for information that is not there.",
    "This is left unanswered by what I was given.",
    "I find no support for any option in the input.",
    "The clip would have to be given more fully to decide this.",
    "Without the absent signal there is no telling.",
    "The piece of the clip that matters is out of reach.",
    "No conclusion follows from what is at my disposal.",
    "I cannot pick an option on the strength of this.",
    "The facts asked for are not part of this input.",
    "What was handed to me falls short of an answer.",
    "This is a blank in the material I have.",
    "There is too little to go on.",
    "The given signals are not the ones that this question needs.",
    "The clip, as far as it is given, does not show it.",
    "One would need what has been taken away to answer.",
    "I can neither confirm nor rule out any option.",
    "That detail is out of view, out of earshot and unwritten here.",
    "For want of the right signal, no option can be chosen.",
    "The answer hinges on something that I cannot perceive here.",
    "Here it stays unclear which option holds.",
    "Deciding this would mean making something up.",
    "The provided extract has a gap where the answer would be.",
    "What reached me of the clip does not cover this.",
    "Not one of the options can be checked against this input.",
    "The evidence for this sits in a signal that was dropped.",
    "This question outruns the signals that came with it.",
    "A choice would have nothing to stand on.",
    "I am missing the signal that would decide.",
    "The clip's remaining signals do not tell.",
    "There is no hint of the answer in the given signals.",
    "As it stands, the question has to stay open.",
    "The content needed for a verdict is not in front of me.",
    "These signals by themselves do not give the answer away.",
    "To know this, I would have to be given more of the clip.",
    "It is not possible to single out an option from this.",
    "What could decide it has not been included.",
    "From where I stand, the answer is hidden.",
    "I have to leave this open, as the clue is elsewhere in the clip.",
    "The supplied portion is not the one that answers this.",
    "No signal that I have bears the answer.",
    "I hold back: the question cannot be judged on these terms.",
)
"""A hundred ways to say so, in wordings of our own (MAPLE, arXiv 2602.11596, B.2, has as many of its own)."""

_NONE = re.compile(
    r"^(none|neither|nothing|unknown|unclear|unsure|uncertain|undetermined|indeterminable|n/?a|not sure|i (do not|don't) know)$"
    r"|^(none|neither|nothing) (of|from|among) (the|these|those|them)\b"
    r"|^not (given|stated|mentioned|specified|provided|shown|known|determinable|answerable|possible to (say|tell|answer))$"
    r"|\b(cannot|can't|can not|could not|couldn't|impossible to|not possible to|unable to|no way to|hard to)"
    r" (be )?(confidently |reliably )?(answer|tell|told|say|said|determin|judg|know|infer|conclu|decid)"
    r"|\b(not enough|insufficient|too little|no) (information|evidence|data|context|details?)\b"
)
_OTHERS = re.compile(
    r"\b(all|both|any|either|each|none|neither) (of )?(the )?(above|foregoing|preceding)\b"
    r"|\b(above|foregoing|preceding|other|of the) (options?|answers?|choices?|statements?)\b"
    r"|\b(option|choice)s? \(?[a-h]\)?(?= |$)"
    r"|^(all|both|any|either|each|none|neither)( of)? (these|those|them|two|three|four)$"
    r"|^(only |both |either |neither )?\(?[a-h]\)?((,| and| or| nor| &|, and) \(?[a-h]\)?)+( only)?$"
    r"|^(both|neither|either|all)$"
)


def plain_option(text: str) -> str:
    """Return an option as it is compared with others: case, white space, look-alikes and a final stop do not count."""
    return (" ".join(text.casefold().split()) if text.isascii() else plain(text)).rstrip(" .!?;:,")


_OWN = frozenset(map(plain_option, NONE_ANSWERS))


def says_none(option: str) -> bool:
    """Return whether an option, in the form of [`plain_option`], says that none is right or that it cannot be known."""
    return option in _OWN or _NONE.search(option) is not None


def speaks_of_others(option: str) -> bool:
    """Return whether an option, in the form of [`plain_option`], speaks of others, as `both A and B` does."""
    return _OTHERS.search(option) is not None
