"""Workloads: request traces, synthetic lengths, arrival processes. Imports neither numpy nor rich."""

from neo.workload.arrivals import ARRIVALS, apply_arrivals
from neo.workload.base import TraceRequest, Workload
from neo.workload.describe import describe, render
from neo.workload.readers import read_trace, write_jsonl
from neo.workload.registry import FORMATS, TraceFormat, csv_with, json_lines_with, trace_format
from neo.workload.source import FieldError, Source, TokensColumn, number_from_json, tokens_from_json
from neo.workload.synthetic import GRAMMAR, parse_lengths, synthetic

__all__ = [
    "ARRIVALS",
    "FORMATS",
    "GRAMMAR",
    "FieldError",
    "Source",
    "TokensColumn",
    "TraceFormat",
    "TraceRequest",
    "Workload",
    "apply_arrivals",
    "csv_with",
    "describe",
    "json_lines_with",
    "number_from_json",
    "parse_lengths",
    "read_trace",
    "render",
    "synthetic",
    "tokens_from_json",
    "trace_format",
    "write_jsonl",
]
