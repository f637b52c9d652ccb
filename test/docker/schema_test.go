package docker

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

// document is what the contract test reads of Docker's API document.
type document struct {
	Info        struct{ Version string }
	Paths       map[string]map[string]operation
	Definitions map[string]*schema
	Responses   map[string]answerSpec
}

type operation struct {
	Tags       []string
	Summary    string
	Parameters []struct {
		Name, In string
		Required bool
		Schema   *schema
	}
	Responses map[string]answerSpec
}

type answerSpec struct {
	Ref    string `yaml:"$ref"`
	Schema *schema
}

// schema is Swagger 2.0's, as far as the document uses it.
type schema struct {
	Ref                  string `yaml:"$ref"`
	Type                 string
	Format               string
	Enum                 []any
	Required             []string
	Properties           map[string]*schema
	Items                *schema
	AllOf                []*schema `yaml:"allOf"`
	AdditionalProperties yaml.Node `yaml:"additionalProperties"`
	Nullable             bool      `yaml:"x-nullable"`
	Minimum, Maximum     *float64
}

// readDocument finds the document in the module that the engine is built with.
func readDocument(t *testing.T) *document {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/moby/moby/api").Output()
	dir := strings.TrimSpace(string(out))
	if err != nil || dir == "" {
		t.Skipf("SKIP: the module github.com/moby/moby/api is not here: %v", err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "swagger.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	d := &document{}
	if err := yaml.Unmarshal(b, d); err != nil {
		t.Fatal(err)
	}
	return d
}

// answer finds what the document says about a status of an operation.
func (d *document) answer(o operation, status int) (answerSpec, bool) {
	a, ok := o.Responses[strconv.Itoa(status)]
	if n, found := strings.CutPrefix(a.Ref, "#/responses/"); found {
		a = d.Responses[n]
	}
	return a, ok
}

// checker compares a JSON value with a schema and gathers what differs.
type checker struct {
	doc   *document
	also  []string // further fields that are right
	found []string
}

func (c *checker) bad(at, format string, args ...any) {
	c.found = append(c.found, at+": "+fmt.Sprintf(format, args...))
}

// check compares v, as encoding/json decodes it with UseNumber.
func (c *checker) check(at string, s *schema, v any) {
	if s == nil {
		return
	}
	s = c.resolve(s)
	if v == nil {
		// Docker's nil lists, maps and numbers are null; the document marks few of them.
		if !s.Nullable && s.Type == "string" {
			c.bad(at, "null, want string")
		}
		return
	}
	if len(s.Enum) > 0 && !slices.ContainsFunc(s.Enum, func(e any) bool { return fmt.Sprint(e) == fmt.Sprint(v) }) {
		c.bad(at, "%v is none of %v", v, s.Enum)
	}
	switch s.Type {
	case "string":
		t, ok := v.(string)
		if !ok {
			c.bad(at, "%T, want string", v)
			return
		}
		c.format(at, s.Format, t)
	case "integer", "number":
		n, ok := v.(json.Number)
		if !ok {
			c.bad(at, "%T, want %s", v, s.Type)
			return
		}
		if _, err := n.Int64(); err != nil && s.Type == "integer" {
			if _, uerr := strconv.ParseUint(n.String(), 10, 64); uerr != nil {
				c.bad(at, "%s is no integer", n)
			}
		}
	case "boolean":
		if _, ok := v.(bool); !ok {
			c.bad(at, "%T, want boolean", v)
		}
	case "array":
		l, ok := v.([]any)
		if !ok {
			c.bad(at, "%T, want array", v)
			return
		}
		for i, x := range l {
			c.check(fmt.Sprintf("%s[%d]", at, i), s.Items, x)
		}
	default:
		if s.Type == "object" || len(s.Properties) > 0 {
			c.object(at, s, v)
		}
	}
}

func (c *checker) format(at, format, v string) {
	switch format {
	case "dateTime", "date-time":
		if v == "" {
			return // "never", where it is allowed to be
		}
		if _, err := time.Parse(time.RFC3339Nano, v); err != nil {
			c.bad(at, "%q is no time", v)
		}
	case "ip-address":
		if v == "" || v == "invalid IP" {
			return
		}
		if _, err := netip.ParseAddr(v); err != nil {
			c.bad(at, "%q is no address", v)
		}
	}
}

func (c *checker) object(at string, s *schema, v any) {
	m, ok := v.(map[string]any)
	if !ok {
		c.bad(at, "%T, want object", v)
		return
	}
	for _, r := range s.Required {
		if _, ok := m[r]; !ok {
			c.bad(at, "%s is missing", r)
		}
	}
	open := s.AdditionalProperties.Kind != 0 && s.AdditionalProperties.Value != "false"
	var rest *schema
	if s.AdditionalProperties.Kind == yaml.MappingNode {
		rest = &schema{}
		if err := s.AdditionalProperties.Decode(rest); err != nil {
			c.bad(at, "the document: %v", err)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		p, known := s.Properties[k]
		switch {
		case known:
			c.check(at+"."+k, p, m[k])
		case rest != nil:
			c.check(at+"["+k+"]", rest, m[k])
		case !open && len(s.Properties) > 0 && !slices.Contains(c.also, k):
			c.bad(at, "%s is not in the document", k)
		}
	}
}

// resolve follows references and joins what allOf says.
func (c *checker) resolve(s *schema) *schema {
	for s.Ref != "" {
		n := strings.TrimPrefix(s.Ref, "#/definitions/")
		to := c.doc.Definitions[n]
		if to == nil {
			c.bad(s.Ref, "the document does not define it")
			return &schema{}
		}
		if s.Nullable && !to.Nullable {
			cp := *to
			cp.Nullable = true
			to = &cp
		}
		s = to
	}
	if len(s.AllOf) == 0 {
		return s
	}
	j := *s
	j.AllOf = nil
	j.Properties = maps.Clone(s.Properties)
	if j.Properties == nil {
		j.Properties = map[string]*schema{}
	}
	for _, part := range s.AllOf {
		p := c.resolve(part)
		maps.Copy(j.Properties, p.Properties)
		j.Required = append(slices.Clone(j.Required), p.Required...)
		if j.Type == "" {
			j.Type = p.Type
		}
		if len(j.Enum) == 0 {
			j.Enum = p.Enum
		}
		j.Nullable = j.Nullable || p.Nullable
		if p.AdditionalProperties.Kind != 0 {
			j.AdditionalProperties = p.AdditionalProperties
		}
	}
	return &j
}

func TestSchemaChecker(t *testing.T) {
	d := &document{Definitions: map[string]*schema{}}
	err := yaml.Unmarshal([]byte(`
definitions:
  Base: {type: object, required: [Id], properties: {Id: {type: string}}}
  Full:
    allOf:
      - {$ref: "#/definitions/Base"}
      - {type: object, properties: {N: {type: integer}, Kind: {type: string, enum: [a, b]}, When: {type: string, format: dateTime}, L: {type: array, items: {type: boolean}}}}
  Map: {type: object, additionalProperties: {type: integer}}
`), d)
	if err != nil {
		t.Fatal(err)
	}
	for body, want := range map[string]string{
		`{"Id":"x","N":1,"Kind":"a","When":"2024-01-01T00:00:00Z","L":[true]}`: "",
		`{"Id":"x","L":null}`:       "",
		`{"N":1}`:                   ": Id is missing",
		`{"Id":1}`:                  ".Id: json.Number, want string",
		`{"Id":"x","N":1.5}`:        ".N: 1.5 is no integer",
		`{"Id":"x","Kind":"c"}`:     ".Kind: c is none of [a b]",
		`{"Id":"x","When":"today"}`: `.When: "today" is no time`,
		`{"Id":"x","L":[true,1]}`:   ".L[1]: json.Number, want boolean",
		`{"Id":"x","Other":1}`:      ": Other is not in the document",
		`{"Id":null}`:               ".Id: null, want string",
		`[]`:                        ": []interface {}, want object",
	} {
		c := &checker{doc: d}
		c.check("", &schema{Ref: "#/definitions/Full"}, decoded(t, body))
		if got := strings.Join(c.found, "; "); got != want {
			t.Errorf("%s: %q, want %q", body, got, want)
		}
	}
	c := &checker{doc: d}
	c.check("", &schema{Ref: "#/definitions/Map"}, decoded(t, `{"a":1,"b":"x"}`))
	if len(c.found) != 1 {
		t.Errorf("a map: %q", c.found)
	}
}

func decoded(t *testing.T, body string) any {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(body))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	return v
}
