"""A bundle ready to answer: a question about a picture, answered at once, piece by piece, in another thread or in a row."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Unpack

from edgesafe.errors import CertificateMismatchError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import read_certificate
from edgesafe.format.exits import Exit
from edgesafe.format.suite import MAX_NEW_TOKENS
from edgesafe.format.tiles import ALONE, Cut
from edgesafe.hub.fetch import bundle_folder
from edgesafe.runtime.answer import Answer, AnswerStream, PendingAnswer
from edgesafe.runtime.choose import Budget, check_max_new_tokens
from edgesafe.runtime.conversation import AskOptions, Conversation, Options
from edgesafe.runtime.engine import Array, Engine
from edgesafe.runtime.image import Picture
from edgesafe.runtime.opened import OpenedBundle
from edgesafe.runtime.sampling import GREEDY, Picker, Sampling
from edgesafe.runtime.tokenizer import TextStream, encode_prompt
from edgesafe.runtime.turns import WAIT, Cancel


class Session(OpenedBundle):
    """A verified bundle, its certificate and its graphs; safe to use from several threads.

    One request runs at a time. Another one waits for its turn (``when_busy="wait"``, in the order of asking) or raises
    ``BusyError`` (``"refuse"``). What ``OpenedBundle`` has takes no turn. A fork of the process that opened it can't use it:
    every request there raises ``ClosedError``, and closing or dropping it is harmless.
    """

    @staticmethod
    def open(
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        allow_uncertified: bool = False,
        engine: Engine | None = None,
        when_busy: str = WAIT,
    ) -> Session:
        """Verify every byte of a bundle and load it.

        Its certificate counts where the same kernels run that made it, or where ``edgesafe smoke`` has passed. Elsewhere
        ``certified`` is empty, ``standing.why`` says why, and only ``allow_uncertified`` gets answers.

        Args:
            path: The bundle's folder, or ``hub:ORG/NAME@REVISION`` on the Hugging Face hub (the ``hub`` extra).
            threads: Threads of each graph; by default those that ``edgesafe measure`` found best here, else the
                device profile's, or this machine's if fewer.
            allow_uncertified: Let ``ask`` use an exit without a passed verdict, and open a bundle whose
                certificate is of other bytes. Each answer then says so.
            engine: What runs the graphs; by default Python's onnxruntime.
            when_busy: What a request does while another one runs: ``wait`` or ``refuse``.

        Raises:
            BundleError: The folder is not a bundle, or its bytes are not those that were sealed.
            CertificateMismatchError: Its certificate is of other bytes.
            ConfigError, InputError, HubError: As by ``edgesafe.hub.fetch.fetch_bundle``, where it is on the hub.
        """
        bundle = Bundle.open(bundle_folder(path))
        try:
            certificate, note = read_certificate(bundle), ""
        except CertificateMismatchError:
            if not allow_uncertified:
                raise
            certificate, note = None, "the certificate is of other bytes and was ignored"
        return Session(
            bundle,
            certificate,
            threads=threads,
            allow_uncertified=allow_uncertified,
            note=note,
            engine=engine,
            when_busy=when_busy,
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, image: Picture, prompt: str, budget: Budget | None = None, **options: Unpack[AskOptions]) -> Answer:
        """Answer a question about a picture.

        Args:
            image: A path, a PIL image or uint8 [H,W,3].
            prompt: The question, plain text.
            budget: See `edgesafe.runtime.conversation.Options`.
            **options: ``exit``, ``max_image_tokens``, ``allow_uncertified``, ``max_new_tokens``, ``sampling``, ``cancel`` and
                ``progress``; see there.

        Raises:
            InputError: The picture, the prompt or an option can't be used.
            UncertifiedExitError: No passed verdict allows the exit.
            NoExitFitsError: The budget is below the fastest certified exit (``on_miss`` ``error``).
            NotMeasuredError: A budget was given and nothing predicts the exits' times, or only an estimate does
                and the budget demands a measurement.
            BusyError, CancelledError, ClosedError: It is not its turn, was cancelled, or the session was closed.
        """
        return self.stream(image, prompt, budget, **options).answer

    def stream(
        self, image: Picture, prompt: str, budget: Budget | None = None, **options: Unpack[AskOptions]
    ) -> AnswerStream[Answer]:
        """Like ``ask``, but yields the text as it comes. A wrong input raises here, before any text.

        It returns once it is this request's turn, and keeps the turn until it was read to its end or closed.
        """
        return Conversation(self, image, Options(budget, **options)).stream(prompt)

    def ask_async(
        self, image: Picture, prompt: str, budget: Budget | None = None, **options: Unpack[AskOptions]
    ) -> PendingAnswer[Answer]:
        """Like ``ask``, in a thread of the session's: wait with ``result()`` or ``await``, end it with ``cancel()``.

        Its place in line is taken here. What ``ask`` raises comes out of ``result()``, but for ``BusyError`` and
        ``ClosedError``, which are raised here.
        """
        self.turns.check_open()
        asked, start_s = Options(budget, **options), self.clock()
        cancel, talk = asked.cancel or Cancel(), Conversation(self, image, asked)
        # One step, or the worker could get two requests in another order than the line's, and wait for the one behind it.
        with self.handing_over:
            turn = self.turns.enter(cancel, asked.progress)
            pending = PendingAnswer(lambda: talk.begin(turn, start_s, prompt, asked).answer, cancel)
            try:
                self.worker.submit(pending.run)
            except RuntimeError:  # closed since the turn was taken
                turn.leave()
                self.turns.check_open()
                raise
        return pending

    def conversation(self, image: Picture, budget: Budget | None = None, **options: Unpack[AskOptions]) -> Conversation:
        """Several questions about one picture, which is paid for once.

        Args are those of ``ask``. The budget is each question's; the first one finds the exit. The other options hold for every
        question that doesn't name its own.

        Raises:
            InputError, UncertifiedExitError, ClosedError: As by ``ask``; the picture is read by the first question.
        """
        talk = Conversation(self, image, Options(budget, **options))
        talk.check()
        return talk

    def vision_states(self, image: Picture, exits: Collection[Exit | int | str]) -> dict[Exit, Array]:
        """The image features of each asked exit, shared segments run once.

        Args:
            image: As in ``ask``.
            exits: Each an exit, its depth or its text.

        Returns:
            float32 [N,D] by exit.

        Raises:
            InputError: The picture or one of the exits can't be used.
            BundleError: The bundle has no such exit.
        """
        asked = sorted(map(Exit.of, exits))
        kinds = {exit.tiles: exit for exit in asked}
        found: dict[Exit, Array] = {}
        with self.turns.enter():
            for tiles, one in kinds.items():
                some = [exit for exit in asked if exit.tiles == tiles]
                found |= self.run_exits(self.look(image, one), some, self.cut(image, one))
        return {exit: found[exit] for exit in asked}

    def answer_features(
        self,
        features: Array,
        prompt: str,
        max_new_tokens: int = MAX_NEW_TOKENS,
        cut: Cut = ALONE,
        sampling: Sampling = GREEDY,
    ) -> str:
        """The answer's text for image features [N,D] that were computed before, of a picture that is cut so."""
        check_max_new_tokens(max_new_tokens)
        text = TextStream(self.tokenizer)
        fewer = next((exit for exit in self.manifest.ladder if exit.visual_tokens == len(features)), self.manifest.reference)
        ids = encode_prompt(self.tokenizer, self.manifest, prompt, cut, fewer)
        with self.turns.enter():
            for token in self.tokens(features, ids, max_new_tokens, Picker(sampling, ids).pick):
                text.push(token)
        text.finish()
        return text.text
