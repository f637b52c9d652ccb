package driver

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"text/template/parse"
	"unicode"
)

// Tags are written in the language of text/template, as Docker's are. That package
// calls methods by names that are known only when it runs, so that a program with it
// keeps every method of every type: a seventh of the engine. This is the part of the
// language that tags use, over the same parser: values, calls, pipelines, if and with.

// maxTag bounds what a tag may become.
const maxTag = 4096

var errTagLong = errors.New("the tag is longer than 4096 bytes")

const shortLen = 12

func shorten(s string) string { return s[:min(len(s), shortLen)] }

// fields are what tags can name, by the names that Docker's users know.
func (c Container) fields() map[string]any {
	return map[string]any{
		"ID": shorten(c.ContainerID), "FullID": c.ContainerID, "Name": strings.TrimPrefix(c.ContainerName, "/"),
		"ImageID": shorten(c.ContainerImageID), "ImageFullID": c.ContainerImageID, "ImageName": c.ContainerImageName,
		"Command":     strings.Join(append([]string{c.ContainerEntrypoint}, c.ContainerArgs...), " "),
		"Hostname":    os.Hostname,
		"ContainerID": c.ContainerID, "ContainerName": c.ContainerName, "ContainerEntrypoint": c.ContainerEntrypoint, "ContainerArgs": c.ContainerArgs,
		"ContainerImageID": c.ContainerImageID, "ContainerImageName": c.ContainerImageName, "ContainerCreated": c.ContainerCreated,
		"ContainerEnv": c.ContainerEnv, "ContainerLabels": c.ContainerLabels, "LogPath": c.LogPath, "DaemonName": c.DaemonName,
	}
}

// Tag renders the option tag, or the given default where there is none.
func (c Container) Tag(o map[string]string, otherwise string) (string, error) {
	text := o["tag"]
	if text == "" {
		text = otherwise
	}
	if !strings.Contains(text, "{{") {
		return text, nil
	}
	out, err := c.render(text)
	if err != nil {
		return "", invalid("invalid log tag: %w", err)
	}
	return out, nil
}

// checkTag finds what is wrong with a tag whatever container it is for.
func checkTag(text string) error {
	var syntax *syntaxError
	if _, err := (Container{}).render(text); errors.As(err, &syntax) || errors.Is(err, errNever) {
		return invalid("invalid log tag: %w", err)
	}
	return nil
}

type syntaxError struct{ error }

func (c Container) render(text string) (string, error) {
	names := map[string]any{}
	for n := range tagFuncs {
		names[n] = true
	}
	trees, err := parse.Parse("log-tag", text, "{{", "}}", names)
	if err != nil {
		return "", &syntaxError{err}
	}
	var b bounded
	t := tagWriter{w: &b, root: c.fields()}
	if tree := trees["log-tag"]; tree != nil { // none where all is empty
		err = t.list(tree.Root, t.root)
	}
	return b.String(), err
}

type bounded struct{ bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	if b.Len()+len(p) > maxTag {
		return 0, errTagLong
	}
	return b.Buffer.Write(p)
}

// tagWriter evaluates a tag.
type tagWriter struct {
	w    io.Writer
	root map[string]any
}

// errNever marks what no container makes right.
var errNever = errors.New("log tags have values, calls, pipelines, if and with")

func cannotTag(n parse.Node) error { return fmt.Errorf("%s is not for a log tag: %w", n, errNever) }

func (t tagWriter) list(l *parse.ListNode, dot any) error {
	if l == nil {
		return nil
	}
	for _, n := range l.Nodes {
		if err := t.node(n, dot); err != nil {
			return err
		}
	}
	return nil
}

func (t tagWriter) node(n parse.Node, dot any) error {
	switch n := n.(type) {
	case *parse.TextNode:
		_, err := t.w.Write(n.Text)
		return err
	case *parse.CommentNode:
		return nil
	case *parse.ActionNode:
		v, err := t.pipe(n.Pipe, dot)
		if err != nil {
			return err
		}
		_, err = fmt.Fprint(t.w, shown(v))
		return err
	case *parse.IfNode:
		v, err := t.pipe(n.Pipe, dot)
		if err != nil {
			return err
		}
		if truth(v) {
			return t.list(n.List, dot)
		}
		return t.list(n.ElseList, dot)
	case *parse.WithNode:
		v, err := t.pipe(n.Pipe, dot)
		if err != nil {
			return err
		}
		if truth(v) {
			return t.list(n.List, v)
		}
		return t.list(n.ElseList, dot)
	}
	return cannotTag(n)
}

// pipe gives each command's value to the next one as its last argument.
func (t tagWriter) pipe(p *parse.PipeNode, dot any) (v any, err error) {
	if len(p.Decl) > 0 {
		return nil, cannotTag(p)
	}
	for i, c := range p.Cmds {
		var last []any
		if i > 0 {
			last = []any{v}
		}
		if v, err = t.command(c, dot, last); err != nil {
			return nil, err
		}
	}
	return v, nil
}

func (t tagWriter) command(c *parse.CommandNode, dot any, last []any) (any, error) {
	first, ok := c.Args[0].(*parse.IdentifierNode)
	if !ok {
		if len(c.Args) > 1 || last != nil {
			return nil, fmt.Errorf("%s is no function", c.Args[0])
		}
		return t.value(c.Args[0], dot)
	}
	var args []any
	for _, a := range c.Args[1:] {
		v, err := t.value(a, dot)
		if err != nil {
			return nil, err
		}
		args = append(args, v)
	}
	v, err := tagFuncs[first.Ident](append(args, last...))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", first.Ident, err)
	}
	return v, nil
}

func (t tagWriter) value(n parse.Node, dot any) (any, error) {
	switch n := n.(type) {
	case *parse.DotNode:
		return dot, nil
	case *parse.FieldNode:
		return member(dot, n.Ident)
	case *parse.VariableNode:
		if n.Ident[0] == "$" {
			return member(t.root, n.Ident[1:])
		}
	case *parse.ChainNode:
		v, err := t.value(n.Node, dot)
		if err != nil {
			return nil, err
		}
		return member(v, n.Field)
	case *parse.PipeNode:
		return t.pipe(n, dot)
	case *parse.IdentifierNode:
		return t.command(&parse.CommandNode{Args: []parse.Node{n}}, dot, nil)
	case *parse.StringNode:
		return n.Text, nil
	case *parse.BoolNode:
		return n.True, nil
	case *parse.NumberNode:
		if n.IsInt {
			return int(n.Int64), nil
		}
	}
	return nil, cannotTag(n)
}

// member follows names into v.
func member(v any, names []string) (any, error) {
	for _, n := range names {
		switch m := v.(type) {
		case map[string]any:
			next, ok := m[n]
			if !ok {
				return nil, fmt.Errorf("%w: a container has no .%s, but .%s", errNever, n, strings.Join(slices.Sorted(maps.Keys(m)), " ."))
			}
			v = next
		case map[string]string:
			v = m[n]
		default:
			return nil, fmt.Errorf("there is no .%s in %v", n, shown(v))
		}
		if f, ok := v.(func() (string, error)); ok {
			s, err := f()
			if err != nil {
				return nil, err
			}
			v = s
		}
	}
	return v, nil
}

// shown is how a value is written: nobody needs the whole container.
func shown(v any) any {
	if m, ok := v.(map[string]any); ok {
		return m["ID"]
	}
	return v
}

func truth(v any) bool {
	r := reflect.ValueOf(v)
	switch r.Kind() {
	case reflect.Invalid:
		return false
	case reflect.Map, reflect.Slice, reflect.String:
		return r.Len() > 0
	case reflect.Bool:
		return r.Bool()
	case reflect.Int:
		return r.Int() != 0
	}
	return true
}

// tagFuncs are those of Docker's log tags, and of the language's own those that make
// sense without more.
var tagFuncs = map[string]func([]any) (any, error){
	"json": func(a []any) (any, error) {
		if len(a) != 1 {
			return nil, errArguments
		}
		b, err := json.Marshal(shown(a[0]))
		return string(b), err
	},
	"split": func(a []any) (any, error) {
		s, err := texts(a, 2)
		if err != nil {
			return nil, err
		}
		return strings.Split(s[0], s[1]), nil
	},
	"join": func(a []any) (any, error) {
		if len(a) != 2 {
			return nil, errArguments
		}
		l, ok := a[0].([]string)
		sep, ok2 := a[1].(string)
		if !ok || !ok2 {
			return nil, errArguments
		}
		return strings.Join(l, sep), nil
	},
	"lower": ofText(strings.ToLower),
	"upper": ofText(strings.ToUpper),
	"title": ofText(func(s string) string {
		if s == "" {
			return s
		}
		r := []rune(s)
		r[0] = unicode.ToTitle(r[0])
		return string(r)
	}),
	"truncate": func(a []any) (any, error) {
		s, n, err := textAndNumbers(a, 1)
		if err != nil || n[0] < 0 || len(s) <= n[0] {
			return s, err
		}
		return s[:n[0]], nil
	},
	"pad": func(a []any) (any, error) {
		s, n, err := textAndNumbers(a, 2)
		if err != nil || s == "" {
			return s, err
		}
		sp := func(n int) string { return strings.Repeat(" ", min(max(n, 0), maxTag)) }
		return sp(n[0]) + s + sp(n[1]), nil
	},
	"index": func(a []any) (any, error) {
		if len(a) != 2 {
			return nil, errArguments
		}
		switch x := a[0].(type) {
		case map[string]string:
			if k, ok := a[1].(string); ok {
				return x[k], nil
			}
		case []string:
			if i, ok := a[1].(int); ok {
				if i < 0 || i >= len(x) {
					return nil, fmt.Errorf("there is no element %d of %d", i, len(x))
				}
				return x[i], nil
			}
		}
		return nil, errArguments
	},
	"len": func(a []any) (any, error) {
		if len(a) == 1 {
			if r := reflect.ValueOf(a[0]); r.IsValid() && (r.Kind() == reflect.Map || r.Kind() == reflect.Slice || r.Kind() == reflect.String) {
				return r.Len(), nil
			}
		}
		return nil, errArguments
	},
	"print":   func(a []any) (any, error) { return fmt.Sprint(a...), nil },
	"println": func(a []any) (any, error) { return fmt.Sprintln(a...), nil },
	"printf": func(a []any) (any, error) {
		if len(a) > 0 {
			if f, ok := a[0].(string); ok {
				return fmt.Sprintf(f, a[1:]...), nil
			}
		}
		return nil, errArguments
	},
	"eq": func(a []any) (any, error) {
		if len(a) < 2 {
			return nil, errArguments
		}
		return slices.ContainsFunc(a[1:], func(x any) bool { return reflect.DeepEqual(a[0], x) }), nil
	},
	"ne": func(a []any) (any, error) {
		if len(a) != 2 {
			return nil, errArguments
		}
		return !reflect.DeepEqual(a[0], a[1]), nil
	},
	"not": func(a []any) (any, error) {
		if len(a) != 1 {
			return nil, errArguments
		}
		return !truth(a[0]), nil
	},
	"and": func(a []any) (any, error) { return firstWith(a, false) },
	"or":  func(a []any) (any, error) { return firstWith(a, true) },
}

var errArguments = errors.New("these arguments are not what it takes")

// firstWith is the first argument whose truth is this, or the last one.
func firstWith(a []any, want bool) (any, error) {
	if len(a) == 0 {
		return nil, errArguments
	}
	for _, v := range a {
		if truth(v) == want {
			return v, nil
		}
	}
	return a[len(a)-1], nil
}

func ofText(f func(string) string) func([]any) (any, error) {
	return func(a []any) (any, error) {
		s, err := texts(a, 1)
		if err != nil {
			return nil, err
		}
		return f(s[0]), nil
	}
}

func texts(a []any, n int) (out []string, err error) {
	for _, v := range a {
		if s, ok := v.(string); ok {
			out = append(out, s)
		}
	}
	if len(out) != n || len(a) != n {
		return nil, errArguments
	}
	return out, nil
}

func textAndNumbers(a []any, n int) (s string, numbers []int, err error) {
	for i, v := range a {
		switch v := v.(type) {
		case string:
			if i > 0 {
				return "", nil, errArguments
			}
			s = v
		case int:
			numbers = append(numbers, v)
		}
	}
	if len(numbers) != n || len(a) != n+1 {
		return "", nil, errArguments
	}
	return s, numbers, nil
}
