package client

import (
	"encoding"
	"encoding/json"
	"reflect"
	"strconv"
	"strings"
)

// encodeBody renders a request's body as JSON. It means what encoding/json would
// write, less the fields that are zero, which the engine takes for the same. The
// request of a run is made of some two hundred fields, nearly all of them zero:
// encoding/json first compiles an encoder for every type below it, which takes
// half a millisecond that a command line does not have.
func encodeBody(v any) ([]byte, error) {
	e := encoder{b: make([]byte, 0, 1024)}
	err := e.value(reflect.ValueOf(v))
	return e.b, err
}

type encoder struct{ b []byte }

var (
	marshalerType     = reflect.TypeFor[json.Marshaler]()
	textMarshalerType = reflect.TypeFor[encoding.TextMarshaler]()
)

func (e *encoder) value(v reflect.Value) error {
	if !v.IsValid() {
		e.b = append(e.b, "null"...)
		return nil
	}
	switch t := v.Type(); {
	case v.Kind() == reflect.Pointer && v.IsNil(), v.Kind() == reflect.Interface && v.IsNil():
		e.b = append(e.b, "null"...)
		return nil
	case v.Kind() == reflect.Pointer || v.Kind() == reflect.Interface:
		if !t.Implements(marshalerType) {
			return e.value(v.Elem())
		}
		return e.marshal(v)
	case t.Implements(marshalerType), t.Implements(textMarshalerType):
		return e.marshal(v)
	}
	switch v.Kind() {
	case reflect.Bool:
		e.b = strconv.AppendBool(e.b, v.Bool())
	case reflect.String:
		e.str(v.String())
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		e.b = strconv.AppendInt(e.b, v.Int(), 10)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		e.b = strconv.AppendUint(e.b, v.Uint(), 10)
	case reflect.Struct:
		e.b = append(e.b, '{')
		first := true
		if err := e.fields(v, &first); err != nil {
			return err
		}
		e.b = append(e.b, '}')
	case reflect.Slice, reflect.Array:
		return e.list(v)
	case reflect.Map:
		return e.dict(v)
	default:
		return e.marshal(v)
	}
	return nil
}

// fields writes the fields of a struct, those of embedded ones among them.
func (e *encoder) fields(v reflect.Value, first *bool) error {
	t := v.Type()
	for i := range t.NumField() {
		fv := v.Field(i)
		if fv.IsZero() {
			continue
		}
		f := t.Field(i)
		tag := f.Tag.Get("json")
		name, opts, _ := strings.Cut(tag, ",")
		if f.Anonymous && name == "" {
			if fv.Kind() == reflect.Pointer {
				fv = fv.Elem()
			}
			if fv.Kind() == reflect.Struct {
				if err := e.fields(fv, first); err != nil {
					return err
				}
				continue
			}
		}
		if !f.IsExported() || tag == "-" {
			continue
		}
		if k := fv.Kind(); (k == reflect.Slice || k == reflect.Map) && fv.Len() == 0 && strings.Contains(opts, "omitempty") {
			continue
		}
		if name == "" {
			name = f.Name
		}
		if !*first {
			e.b = append(e.b, ',')
		}
		*first = false
		e.str(name)
		e.b = append(e.b, ':')
		if err := e.value(fv); err != nil {
			return err
		}
	}
	return nil
}

func (e *encoder) list(v reflect.Value) error {
	if v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Uint8 {
		return e.marshal(v) // base64
	}
	if v.Kind() == reflect.Slice && v.IsNil() {
		e.b = append(e.b, "null"...)
		return nil
	}
	e.b = append(e.b, '[')
	for i := range v.Len() {
		if i > 0 {
			e.b = append(e.b, ',')
		}
		if err := e.value(v.Index(i)); err != nil {
			return err
		}
	}
	e.b = append(e.b, ']')
	return nil
}

func (e *encoder) dict(v reflect.Value) error {
	if v.IsNil() {
		e.b = append(e.b, "null"...)
		return nil
	}
	if k := v.Type().Key(); k.Kind() != reflect.String && !k.Implements(textMarshalerType) {
		return e.marshal(v)
	}
	e.b = append(e.b, '{')
	for i, it := 0, v.MapRange(); it.Next(); i++ {
		if i > 0 {
			e.b = append(e.b, ',')
		}
		if m, ok := it.Key().Interface().(encoding.TextMarshaler); ok {
			text, err := m.MarshalText()
			if err != nil {
				return err
			}
			e.str(string(text))
		} else {
			e.str(it.Key().String())
		}
		e.b = append(e.b, ':')
		if err := e.value(it.Value()); err != nil {
			return err
		}
	}
	e.b = append(e.b, '}')
	return nil
}

// marshal leaves a value to encoding/json.
func (e *encoder) marshal(v reflect.Value) error {
	b, err := json.Marshal(v.Interface())
	e.b = append(e.b, b...)
	return err
}

// str writes a string; what is not plain ASCII is left to encoding/json.
func (e *encoder) str(s string) {
	for i := range len(s) {
		if c := s[i]; c < 0x20 || c >= 0x7f || c == '"' || c == '\\' {
			b, _ := json.Marshal(s)
			e.b = append(e.b, b...)
			return
		}
	}
	e.b = append(e.b, '"')
	e.b = append(e.b, s...)
	e.b = append(e.b, '"')
}
