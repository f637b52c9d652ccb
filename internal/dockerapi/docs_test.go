package dockerapi

import (
	"fmt"
	"go/ast"
	"go/doc"
	"go/parser"
	"go/token"
	"go/types"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// ownRoutes lists the routes that are not Docker's.
func ownRoutes() string {
	var b strings.Builder
	b.WriteString("| method | path |\n|---|---|\n")
	for _, r := range routes(Config{}) {
		if strings.HasPrefix(r.pattern, "/servin/") || r.pattern == "/metrics" {
			fmt.Fprintf(&b, "| %s | `%s` |\n", r.method, r.pattern)
		}
	}
	return b.String()
}

// ownTypes describes the wire types of package api: their comments and fields.
func ownTypes(t *testing.T) string {
	t.Helper()
	fset := token.NewFileSet()
	pkgs, err := parser.ParseDir(fset, "../../api", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	files := []*ast.File{}
	for name, f := range pkgs["api"].Files {
		if !strings.HasSuffix(name, "_test.go") {
			files = append(files, f)
		}
	}
	slices.SortFunc(files, func(a, b *ast.File) int { return strings.Compare(fset.File(a.Pos()).Name(), fset.File(b.Pos()).Name()) })
	pkg, err := doc.NewFromFiles(fset, files, "api")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, ty := range pkg.Types {
		spec := ty.Decl.Specs[0].(*ast.TypeSpec)
		st, ok := spec.Type.(*ast.StructType)
		if !ok {
			continue
		}
		fmt.Fprintf(&b, "\n### %s\n\n%s\n", ty.Name, paragraph(ty.Doc))
		if len(st.Fields.List) == 0 {
			continue
		}
		b.WriteString("\n| field | type | |\n|---|---|---|\n")
		for _, f := range st.Fields.List {
			text := paragraph(f.Doc.Text())
			if text == "" {
				text = paragraph(f.Comment.Text())
			}
			names := f.Names
			if len(names) == 0 {
				fmt.Fprintf(&b, "| | the fields of `%s` | %s |\n", types.ExprString(f.Type), text)
			}
			for _, n := range names {
				if n.IsExported() {
					fmt.Fprintf(&b, "| %s | `%s` | %s |\n", jsonName(n.Name, f.Tag), types.ExprString(f.Type), strings.ReplaceAll(text, "|", "\\|"))
				}
			}
		}
	}
	return b.String()
}

func jsonName(name string, tag *ast.BasicLit) string {
	if tag == nil {
		return name
	}
	n, _, _ := strings.Cut(reflect.StructTag(strings.Trim(tag.Value, "`")).Get("json"), ",")
	if n == "" {
		return name
	}
	return n
}

// paragraph is a comment on one line.
func paragraph(s string) string { return strings.Join(strings.Fields(s), " ") }
