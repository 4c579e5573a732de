package ecdysis

import (
	"errors"
	"reflect"
	"strconv"
	"strings"
)

// errorf makes an error as fmt.Errorf does. It knows what the errors of this
// package need: %s, %d and %v of strings, integers, errors and Stringers, %q of
// strings and bytes, %T, and %w. A daemon that does not use the formats of
// package fmt itself is 29 kB smaller without them.
func errorf(format string, args ...any) error {
	var text []byte
	var wrapped []error
	for _, arg := range args {
		before, rest, _ := cut(format, '%')
		verb := rest[0]
		text = appendArg(append(text, before...), verb, arg)
		if err, ok := arg.(error); ok && verb == 'w' {
			wrapped = append(wrapped, err)
		}
		format = rest[1:]
	}
	message := string(text) + format
	switch len(wrapped) {
	case 0:
		return errors.New(message)
	case 1:
		return &wrapError{message, wrapped[0]}
	}
	return &wrapErrors{message, wrapped}
}

func appendArg(text []byte, verb byte, arg any) []byte {
	v := reflect.ValueOf(arg)
	switch {
	case arg == nil, verb != 'T' && v.Kind() == reflect.Pointer && v.IsNil():
		return append(text, "<nil>"...) // its Error or String may panic
	case verb == 'T':
		return append(text, v.Type().String()...)
	}
	switch a := arg.(type) {
	case error:
		return append(text, a.Error()...)
	case interface{ String() string }:
		return append(text, a.String()...)
	}
	switch {
	case v.CanInt() && verb == 'q':
		return strconv.AppendQuoteRune(text, rune(v.Int()))
	case v.CanInt():
		return strconv.AppendInt(text, v.Int(), 10)
	case v.CanUint() && verb == 'q':
		return strconv.AppendQuoteRune(text, rune(v.Uint()))
	case v.CanUint():
		return strconv.AppendUint(text, v.Uint(), 10)
	case verb == 'q':
		return strconv.AppendQuote(text, v.String())
	}
	return append(text, v.String()...)
}

// cut is strings.Cut for a separator of one byte, for which there is less to be
// linked.
func cut(s string, sep byte) (before, after string, found bool) {
	if i := strings.IndexByte(s, sep); i >= 0 {
		return s[:i], s[i+1:], true
	}
	return s, "", false
}

// split is strings.Split, likewise.
func split(s string, sep byte) (parts []string) {
	for found := true; found; {
		var part string
		part, s, found = cut(s, sep)
		parts = append(parts, part)
	}
	return parts
}

// A wrapError is an error that wraps another one.
type wrapError struct {
	message string
	err     error
}

func (e *wrapError) Error() string { return e.message }

func (e *wrapError) Unwrap() error { return e.err }

// A wrapErrors is an error that wraps several.
type wrapErrors struct {
	message string
	errs    []error
}

func (e *wrapErrors) Error() string { return e.message }

func (e *wrapErrors) Unwrap() []error { return e.errs }
