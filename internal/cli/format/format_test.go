package format

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

type thing struct {
	name   string
	labels map[string]string
}

func things() *List[thing] {
	return &List[thing]{Quiet: "Name", Table: []string{"shown", "Len"}, Labels: func(t thing) map[string]string { return t.labels },
		Columns: []Column[thing]{
			{Name: "shown", Heading: "NAME", Text: func(t thing) string { return t.name + "*" }},
			{Name: "Name", Heading: "NAME", Text: func(t thing) string { return t.name }},
			{Name: "Len", Heading: "LENGTH", Text: func(t thing) string { return strings.Repeat("x", len(t.name)) }},
		}}
}

func TestList(t *testing.T) {
	rows := []thing{{"a", map[string]string{"io.x/role": "web"}}, {"näme", nil}}
	for name, x := range map[string]struct {
		o    Options
		want string
	}{
		"table":          {Options{}, "NAME    LENGTH\na*      x\nnäme*   xxxxx\n"},
		"named table":    {Options{Template: "table"}, "NAME    LENGTH\na*      x\nnäme*   xxxxx\n"},
		"quiet":          {Options{Quiet: true}, "a\nnäme\n"},
		"template":       {Options{Template: "{{.Name}}!"}, "a!\nnäme!\n"},
		"label":          {Options{Template: `{{.Label "io.x/role"}}`}, "web\n\n"},
		"table template": {Options{Template: `table {{.Name}}\t{{.Label "com.example.my-role"}}`}, "NAME   MY ROLE\na      \nnäme   \n"},
		"real tab":       {Options{Template: "{{.Name}}\t{{.Len}}"}, "a\tx\nnäme\txxxxx\n"},
		"json":           {Options{Template: "json"}, `{"Len":"x","Name":"a"}` + "\n" + `{"Len":"xxxxx","Name":"näme"}` + "\n"},
		"json function":  {Options{Template: "{{json .}}"}, `{"Len":"x","Name":"a"}` + "\n" + `{"Len":"xxxxx","Name":"näme"}` + "\n"},
		"functions":      {Options{Template: `{{upper .Name}} {{title .Name}} {{pad .Name 1 2}}| {{truncate .Name 1}} {{join (split "a,b" ",") "-"}} {{lower "X"}}`}, "A A  a  | a a-b x\nNÄME Näme  näme  | n a-b x\n"},
	} {
		var b bytes.Buffer
		if err := things().Print(&b, rows, x.o); err != nil || b.String() != x.want {
			t.Errorf("%s: %v\n got %q\nwant %q", name, err, b.String(), x.want)
		}
	}
	for _, bad := range []string{"{{", "{{.Nope}}", "{{nofunc}}", "table {{.Nope}}"} {
		if err := things().Print(&bytes.Buffer{}, rows, Options{Template: bad}); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

func TestObject(t *testing.T) {
	type inner struct{ Running bool }
	v := struct {
		ID    string `json:"Id"`
		State inner
		Big   int64
	}{"x", inner{true}, 1 << 40}
	raw, _ := json.Marshal(v)
	raw = append(raw[:len(raw)-1], []byte(`,"New":{"Field":[1,2]}}`)...)
	for in, want := range map[string]string{
		"{{.ID}}":                 "x\n",
		"{{.Id}}":                 "x\n",
		"{{.State.Running}}":      "true\n",
		"{{.Big}}":                "1099511627776\n",
		"{{.New.Field}} {{.Big}}": "[1 2] 1099511627776\n",
		"{{json .State}}":         "{\"Running\":true}\n",
		"json":                    string(raw) + "\n",
	} {
		var b bytes.Buffer
		if err := Object(&b, v, raw, in); err != nil || b.String() != want {
			t.Errorf("%s: %v, got %q, want %q", in, err, b.String(), want)
		}
	}
	if err := Object(&bytes.Buffer{}, v, raw, "{{.Nope}}"); err == nil {
		t.Error("no error")
	}
}

func TestHuman(t *testing.T) {
	now := time.Unix(2e9, 0)
	for got, want := range map[string]string{
		Ago(now.Add(-3*time.Minute), now): "3 minutes ago",
		Ago(time.Time{}, now):             "N/A",
		Ago(time.Unix(0, 0), now):         "N/A",
		Ago(now.Add(time.Hour), now):      "Less than a second ago",
		Size(1_234_567):                   "1.23MB",
		Size(0):                           "0B",
		BinarySize(1 << 30):               "1GiB",
		Ellipsis("abcdef", 4):             "abc…",
		Ellipsis("abc", 4):                "abc",
		Percent(12.345):                   "12.35%",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
