"""Bounds on all external input, shared by the command line, gRPC and sessions."""

MESSAGE_BYTES = 1 << 20  # per gRPC message
FRAMES_PER_MESSAGE = 256
DRAFT_NODES = 256  # nodes per Draft message
TREE_NODES = 2048  # live nodes per session
TREE_DEPTH = 64  # tokens from the root to the deepest node
STEP_ROWS = 64  # nodes per session that a target verifies in one step
SESSIONS = 256  # concurrent sessions per target or drafter
QUEUED_REQUESTS = 1024  # per target
FEATURE_LAYERS = 8  # that a drafter asks for
FEATURE_BYTES = 256 << 10  # of hidden states per message, and at most of one token
NAME_LENGTH = 256  # characters in the name of a session, a model or a drafter
STOP_STRINGS = 4
STOP_LENGTH = 64  # characters
LOGIT_BIAS = 300  # entries
LOGPROBS = 20  # top tokens reported for each output token
CONSTRAINT_BYTES = 16 << 10  # per JSON schema or regular expression
SCHEMA_PROPERTIES = 500  # of all objects allowed at one position of a JSON text
CONSTRAINED_REQUESTS = (
    256  # texts with a constraint at one time on one target; each has a process of its own
)

# HTTP requests to a gateway
BODY_BYTES = 4 << 20
BODY_TIMEOUT_S = 10.0  # for the head of a request, and for its body
HEADERS = 100  # per request
HEADER_BYTES = 16 << 10  # per request, address included
JSON_DEPTH = 32  # nesting of arrays and objects
JSON_ITEMS = 10_000  # per array or object, but for lists of integers
JSON_VALUES = 100_000  # per body, without those of lists of integers
JSON_NUMBER_LENGTH = 64  # characters
CHOICES = 128  # per prompt; the configuration may allow fewer
PROMPTS = 2048  # per request; the configuration may allow fewer
PROMPT_IDS = 1 << 20  # token ids per request; the configuration may allow fewer
ERROR_ECHO_LENGTH = 64  # characters of the input that an error quotes
MAX_DEADLINE_S = 86_400.0  # seconds: the longest that a request may ask for
DEFAULT_MAX_TOKENS = 2048  # of a request that names no maximum
