"""The errors of the client. All are `ClientError`s, and their texts are written for people."""

from __future__ import annotations

from latent_encoder_client.responses import Failure


class ClientError(Exception):
    """The base of every error that the client raises on purpose."""


class EncodeFailed(ClientError):
    """The service gave an error response, the last one after all attempts."""

    def __init__(self, response: Failure, attempts: int) -> None:
        super().__init__(response.error_message)
        self.response = response
        self.attempts = attempts
        """The number of times that the request was sent."""

    @property
    def code(self) -> str:
        """The error code. A newer service may have codes that this client does not know."""
        return self.response.error_code


class ResponseTimeout(ClientError, TimeoutError):
    """No final response came in time. The service may still encode the image."""


class DeliveryFailed(ClientError):
    """The broker did not take the request."""


class BrokerUnavailable(ClientError):
    """The broker cannot be reached, or a topic is missing or may not be read."""


class ResponseUnusable(ClientError):
    """The record of a response does not hold one."""


class ClientClosed(ClientError):
    """The client was closed before the response came."""


class FileUnusable(ClientError):
    """A file of a response cannot be read, or holds no latent."""


class ChecksumMismatch(FileUnusable):
    """A file is not the one that the response describes."""


class StatisticsMissing(ClientError):
    """The response does not have the mean and the deviation of its latent space."""
