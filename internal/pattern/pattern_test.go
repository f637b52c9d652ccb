package pattern_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/pattern"
)

func TestPattern(t *testing.T) {
	p := pattern.New(`^(a+)-b$`)
	if !p.MatchString("aa-b") || p.MatchString("b") {
		t.Error("MatchString is wrong")
	}
	if m := p.FindStringSubmatch("aa-b"); len(m) != 2 || m[1] != "aa" {
		t.Errorf("FindStringSubmatch = %q", m)
	}
	if s := pattern.New(`[^a-z]+`).ReplaceAllString("a12b", "-"); s != "a-b" {
		t.Errorf("ReplaceAllString = %q", s)
	}
}

// Every expression compiles: none is left for a user to find.
func TestAllCompile(t *testing.T) {
	n := 0
	err := filepath.WalkDir("..", func(p string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(p, ".go") {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), p, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(x ast.Node) bool {
			c, ok := x.(*ast.CallExpr)
			if !ok || len(c.Args) != 1 {
				return true
			}
			s, ok := c.Fun.(*ast.SelectorExpr)
			if !ok || s.Sel.Name != "New" {
				return true
			}
			if id, ok := s.X.(*ast.Ident); !ok || id.Name != "pattern" {
				return true
			}
			lit, ok := c.Args[0].(*ast.BasicLit)
			if !ok {
				t.Errorf("%s: the expression is no constant", p)
				return true
			}
			expr, err := strconv.Unquote(lit.Value)
			if err == nil {
				_, err = regexp.Compile(expr)
			}
			if err != nil {
				t.Errorf("%s: %v", p, err)
			}
			n++
			return true
		})
		return nil
	})
	if err != nil || n < 20 {
		t.Errorf("%d expressions seen, %v", n, err)
	}
}
